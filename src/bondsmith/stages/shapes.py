"""The matrices of a model by name and shape, before any weight is read."""

from __future__ import annotations

from bondsmith.model.blocks import BlockRunner, matrices, shape
from bondsmith.model.skeleton import stored_names
from bondsmith.stages.matrix_plan import MatrixPlan


def model_shapes(runner: BlockRunner) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Returns matrix name -> (block, out features, in features) in depth order, and the stored scalars outside these matrices."""
    shapes = {
        f"{runner.path}.{k}.{name}": (k, *shape(matrix))
        for k, block in enumerate(runner.blocks)
        for name, matrix in matrices(block).items()
    }
    state = runner.model.state_dict()
    total = sum(state[name].numel() for name in stored_names(runner.model))
    return shapes, total - sum(o * i for _, o, i in shapes.values())


def table_plans(runner: BlockRunner) -> tuple[MatrixPlan, ...]:
    """Returns embedding, and head where it has weights of its own, as they are: (vocabulary, width) matrices outside the blocks."""
    modules = dict(runner.model.named_modules())
    found = [runner.model.get_input_embeddings(), runner.model.get_output_embeddings()]
    names = [next(name for name, m in modules.items() if m is module) for module in found if module is not None]
    kept = [n for n in names if f"{n}.weight" in stored_names(runner.model)]
    return tuple(MatrixPlan(n, -1, *modules[n].weight.shape) for n in kept)
