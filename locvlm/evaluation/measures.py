"""What a report compares: one table for each task, data set and judge, pairs of arms, and runs over several seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from locvlm.errors import ConfigError, DataError
from locvlm.evaluation.arms import Arm, Result
from locvlm.evaluation.comparison import PairedTest, Spread, compare_runs, spread_of
from locvlm.evaluation.pictures import FIGURES, Example
from locvlm.evaluation.tables import TaskTable, task_table
from locvlm.evaluation.tasks import TASKS


@dataclass(frozen=True, slots=True)
class Measure:
    """One task on one data set under one judge: what each arm has of it, its table and its pictures."""

    results: tuple[Result | None, ...]
    table: TaskTable
    examples: tuple[Example, ...] = ()

    @property
    def figure(self) -> str:
        """Which of the paper's pictures these are like, "" for none."""
        return FIGURES.get(self.table.task, "")


@dataclass(frozen=True, slots=True)
class Compared:
    """Two arms, and of every figure that both have its title with the test, or why there is none."""

    first: str
    second: str
    tests: tuple[tuple[str, PairedTest | str], ...]


@dataclass(frozen=True, slots=True)
class Seeds:
    """A model trained with several seeds: of every primary figure its title and its spread."""

    name: str
    arms: tuple[str, ...]
    rows: tuple[tuple[str, Spread], ...]


def measures_of(arms: Sequence[Arm]) -> list[Measure]:
    """A table for each task, data set and judge that any arm has, in the order of the tasks."""
    order = list(TASKS)
    keys = dict.fromkeys(result.key for arm in arms for result in arm.results)
    found = []
    for key in sorted(keys, key=lambda key: order.index(key[0])):
        task, dataset, judge = key
        alike = [other for other in keys if other[0] == task]
        results = tuple(next((r for r in arm.results if r.key == key), None) for arm in arms)
        entries = [_why_not(arm, key) if r is None else r.metrics for arm, r in zip(arms, results, strict=True)]
        table = task_table(task, [arm.name for arm in arms], entries)
        more = ([dataset] if len({other[1] for other in alike}) > 1 else []) + ([f"judge {judge}"] if judge else [])
        found.append(Measure(results, replace(table, title=table.title + (f" ({', '.join(more)})" if more else ""))))
    return found


def _why_not(arm: Arm, key: tuple[str, str, str]) -> str:
    task, dataset, _ = key
    others = [result.key for result in arm.of(task)]
    if not others:
        return f"not run (no {task}.metrics.json in its folder)"
    judges = sorted({other[2] for other in others if other[1] == dataset})
    if judges:
        return f"judge differs ({', '.join(judges)})"
    return f"not run on these questions (only on {', '.join(sorted({other[1] for other in others}))})"


def compared_of(arms: Sequence[Arm], measures: Sequence[Measure], pairs: Sequence[tuple[str, str]]) -> list[Compared]:
    """Each pair by its primary figures and accuracies; without pairs the first arm with each of the others.

    Raises ConfigError for a name that is no arm's.
    """
    names = [arm.name for arm in arms]
    wanted = list(pairs) or [(names[0], other) for other in names[1:]]
    found = []
    for first, second in wanted:
        numbers = (_number(names, first), _number(names, second))
        tests: list[tuple[str, PairedTest | str]] = []
        for measure in measures:
            one, two = (measure.results[number] for number in numbers)
            if one is not None and two is not None:
                tests += [
                    (f"{measure.table.title}: {row.label}", _test(one, two, row.name))
                    for row in measure.table.rows
                    if row is measure.table.rows[0] or row.name == "accuracy"
                ]
        found.append(Compared(first, second, tuple(tests)))
    return found


def _test(first: Result, second: Result, figure: str) -> PairedTest | str:
    try:
        return compare_runs(first.metrics, second.metrics, figure)
    except DataError as fault:
        return str(fault)


def seeds_of(arms: Sequence[Arm], measures: Sequence[Measure], groups: Mapping[str, Sequence[str]]) -> list[Seeds]:
    """Each group by its primary figures. Raises ConfigError for a name that is no arm\'s."""
    names = [arm.name for arm in arms]
    found = []
    for name, members in groups.items():
        numbers = [_number(names, member) for member in members]
        rows = []
        for measure in measures:
            cells = [cell for row in measure.table.rows[:1] for n, cell in enumerate(row.cells) if n in numbers]
            values = [cell.figure.value for cell in cells if cell.figure is not None]
            if values:
                rows.append((f"{measure.table.title}: {measure.table.rows[0].label}", spread_of(values)))
        found.append(Seeds(name, tuple(members), tuple(rows)))
    return found


def _number(names: Sequence[str], wanted: str) -> int:
    if wanted not in names:
        raise ConfigError(f"reporting: there is no arm {wanted!r}; there are {', '.join(names)}")
    return names.index(wanted)
