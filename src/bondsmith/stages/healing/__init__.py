"""Global distillation: all networks of a compressed model trained together, from one process to many machines."""
