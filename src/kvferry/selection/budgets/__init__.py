"""How many tokens each layer, or each head, keeps. One method, one file; a new one needs a line in ``BUDGETS``."""

from kvferry.plugins import Registry
from kvferry.selection.budgets.base import Budget
from kvferry.selection.budgets.head import Head
from kvferry.selection.budgets.pyramid import Pyramid
from kvferry.selection.budgets.shared import Shared
from kvferry.selection.budgets.sparsity import Sparsity
from kvferry.selection.budgets.uniform import Uniform

BUDGETS: dict[str, type[Budget]] = Registry(
    "budgets",
    {
        "uniform": Uniform,
        "shared": Shared,
        "pyramid": Pyramid,
        "sparsity": Sparsity,
        "head": Head,
    },
)

__all__ = ["BUDGETS", "Budget", "Head", "Pyramid", "Shared", "Sparsity", "Uniform"]
