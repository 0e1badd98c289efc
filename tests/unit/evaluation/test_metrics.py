import numpy as np
import pytest

from locvlm.errors import DataError
from locvlm.evaluation.metrics import Floor, Item, paired_difference, summarise, wilson


def items(values: list[list[float]], figure: str = "accuracy") -> list[Item]:
    """Clusters of values, each value one question with denominator 1."""
    return [
        Item(f"{image}-{number}", str(image), {figure: (value, 1.0)})
        for image, cluster in enumerate(values)
        for number, value in enumerate(cluster)
    ]


def metrics(entries: list[Item], task: str = "presence") -> dict[str, object]:
    figures = {name: {} for entry in entries for name in entry.sums}
    return {
        "task": task,
        "figures": figures,
        "items": {entry.id: {"image": entry.image, "sums": entry.sums} for entry in entries},
    }


def test_a_figure_is_the_ratio_of_sums_over_all_questions() -> None:
    entries = [
        Item("a", "1", {"f1": (2.0, 2.0), "accuracy": (1.0, 1.0)}),
        Item("b", "1", {"f1": (0.0, 1.0), "accuracy": (0.0, 1.0)}),
        Item("c", "2", {"accuracy": (1.0, 1.0)}),
    ]
    found = summarise(entries, ["accuracy", "f1"], {"accuracy": Floor(0.5, "always 'yes'")})
    assert found["accuracy"].value == pytest.approx(2 / 3)
    assert found["accuracy"].n == 3
    assert found["accuracy"].floor == 0.5
    assert found["f1"].value == pytest.approx(2 / 3)
    assert found["f1"].n == 2
    assert found["f1"].floor is None


def test_a_zero_denominator_gives_zero_and_no_interval() -> None:
    figure = summarise(items([[1.0]]), ["precision"], {})["precision"]
    assert (figure.value, figure.n, figure.low, figure.high) == (0.0, 0, None, None)


def test_the_interval_holds_the_truth_about_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(7)
    held = 0
    for _ in range(100):
        chance = np.clip(generator.normal(0.7, 0.2, size=60), 0, 1)  # images differ in difficulty
        truth = 0.6942  # mean of the clipped normal, by a million draws
        data = items([[float(generator.random() < p) for _ in range(4)] for p in chance])
        figure = summarise(data, ["accuracy"], {})["accuracy"]
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= figure.value <= figure.high
        held += figure.low <= truth <= figure.high
    assert 88 <= held <= 99


def test_questions_of_one_image_do_not_count_as_independent() -> None:
    generator = np.random.default_rng(0)
    answers = [float(generator.random() < 0.6) for _ in range(50)]
    alone = summarise(items([[value] for value in answers]), ["accuracy"], {})["accuracy"]
    tenfold = summarise(items([[value] * 10 for value in answers]), ["accuracy"], {})["accuracy"]
    assert alone.low is not None
    assert tenfold.low == pytest.approx(alone.low)  # ten copies of a question teach nothing
    assert tenfold.high == pytest.approx(alone.high)


def test_ten_right_of_ten_is_not_certainty() -> None:
    figure = summarise(items([[1.0]] * 10), ["accuracy"], {})["accuracy"]
    assert figure.low == pytest.approx(0.7225, abs=1e-4)  # Wilson, 10 of 10
    assert figure.high == 1.0


def test_one_image_alone_gives_a_wide_interval() -> None:
    figure = summarise(items([[1.0, 0.0] * 50]), ["accuracy"], {})["accuracy"]
    assert figure.low is not None
    assert figure.high is not None
    assert figure.high - figure.low > 0.8


def test_wilson_agrees_with_the_textbook() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_the_same_items_give_the_same_interval() -> None:
    data = items([[1.0, 0.0], [1.0], [0.0], [1.0, 1.0]])
    assert summarise(data, ["accuracy"], {}) == summarise(data, ["accuracy"], {})


def test_a_paired_difference_is_narrower_than_two_separate_intervals() -> None:
    generator = np.random.default_rng(3)
    hard = [float(generator.random() < 0.5) for _ in range(200)]
    better = [1.0 if value or number % 10 == 0 else 0.0 for number, value in enumerate(hard)]
    first, second = metrics(items([[v] for v in better])), metrics(items([[v] for v in hard]))
    found = paired_difference(first, second)
    gained = sum(better) / 200 - sum(hard) / 200
    assert found.difference == pytest.approx(gained)
    assert 0 < found.low < gained < found.high
    assert found.high - found.low < 0.12  # unpaired it would be about 0.2
    back = paired_difference(second, first)
    assert back.difference == pytest.approx(-gained)
    assert (back.low, back.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_equal_models_have_no_difference() -> None:
    side = metrics(items([[1.0], [0.0], [1.0]]))
    assert paired_difference(side, side) == (0.0, 0.0, 0.0)


def test_models_that_answered_different_questions_are_not_compared() -> None:
    first, second = metrics(items([[1.0], [0.0]])), metrics(items([[1.0]]))
    with pytest.raises(DataError, match="1 occur only in the first"):
        paired_difference(first, second)
    with pytest.raises(DataError, match="no figure 'f1'"):
        paired_difference(first, first, "f1")
    with pytest.raises(DataError, match="`items`"):
        paired_difference({"task": "presence"}, first)


def test_a_figure_may_be_a_formula_of_longer_sums() -> None:
    first = (2.0, 2.0, 0.0, 0.0, 2.0, 2.0, *(0.0,) * 14, 0.0, 2.0, 2.0)  # two content words, both matched, no fragments
    second = (2.0, 4.0, 0.0, 0.0, *(0.0,) * 16, 0.0, 0.0, 0.0)  # nothing matched
    items = [Item("0", "a", {"meteor": first}), Item("1", "b", {"meteor": second}), Item("2", "b", {})]
    figure = summarise(items, ["meteor"], {})["meteor"]
    precision, recall = 2 / 4, 2 / 6
    assert figure.value == pytest.approx(precision * recall / (0.85 * precision + 0.15 * recall))
    assert figure.n == 2
    alone = summarise(items[:1], ["meteor"], {})["meteor"]
    assert alone.value == 1.0


def test_figures_of_different_judges_are_not_compared() -> None:
    one = {"task": "msvd-qa", "figures": {"accuracy": {}}, "items": {}, "judge": "exact"}
    with pytest.raises(DataError, match=r"different judges \(exact, lexical\).*score all with one --judge"):
        paired_difference(one, {**one, "judge": "lexical"})
