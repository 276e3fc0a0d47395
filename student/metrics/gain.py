"""Multi-task gain: how much a student of many tasks gains over one student per task."""

from collections.abc import Collection, Mapping

from teachercache.pipeline.errors import ArgumentError


def mtl_gain(
    scores: Mapping[str, float], single_task: Mapping[str, float], lower_is_better: Collection[str]
) -> float:
    """Mean relative gain over the single-task baseline (SAK, Eq. 7), a fraction: times 100 it is Δm%.

    `scores`, `single_task`: task → its metric, in any unit that is the same in both.
    `lower_is_better`: the tasks whose metric is an error (normals, depth).
    Raises `ValueError` when the tasks differ or a baseline is zero.
    """
    unknown = set(lower_is_better) - set(scores)
    if not scores or set(scores) != set(single_task) or unknown:
        raise ArgumentError(
            "The multi-task gain compares the same tasks.",
            got=f"scores of {sorted(scores)}, baselines of {sorted(single_task)}, "
            f"lower is better for {sorted(lower_is_better)}",
            expected="one score and one baseline for every task",
            do="leave out the tasks that have no baseline, from every argument",
        )
    if zero := [task for task, score in single_task.items() if score == 0]:
        raise ArgumentError(
            "A gain relative to zero is undefined.",
            got=f"a baseline of 0 for {', '.join(zero)}",
            expected="baselines other than 0",
            do="check the single-task run",
        )
    gains = [
        (single_task[task] - score if task in lower_is_better else score - single_task[task])
        / single_task[task]
        for task, score in scores.items()
    ]
    return sum(gains) / len(gains)
