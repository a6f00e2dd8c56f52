"""Results as text."""

from collections.abc import Mapping
from typing import Any

__all__ = ["table_of_results"]


def table_of_results(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay the main metrics of all test sets out in one table.

    Args:
        results: dataset -> task -> metric -> value.

    Returns:
        One row per dataset and task; metrics per class (``AP-person``) are left out.
    """
    from tabulate import tabulate

    rows: list[list[Any]] = []
    columns: list[str] = []
    for dataset, by_task in results.items():
        for task, metrics in by_task.items():
            if not isinstance(metrics, Mapping):
                continue
            shown = {name: value for name, value in metrics.items() if "-" not in name}
            columns += [name for name in shown if name not in columns]
            rows.append([dataset, task, shown])
    cells = [[d, t, *(shown.get(name, "") for name in columns)] for d, t, shown in rows]
    return tabulate(cells, headers=["dataset", "task", *columns], floatfmt=".2f", tablefmt="pipe")
