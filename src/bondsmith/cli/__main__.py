from bondsmith.cli import main

main()
