import pytest
import torch

from gradmatch.core import checks
from gradmatch.core.checks import InputError


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: checks.whole("n", 0), "n is 0; it must be at least 1"),
        (lambda: checks.whole("n", 1.5), "n is 1.5; it must be a whole number"),
        (lambda: checks.whole("n", True), "n is True; it must be a whole number"),
        (lambda: checks.whole("n", 5, least=1, most=4), "between 1 and 4"),
        (lambda: checks.positive("lr", -1), "lr is -1; it must be above 0"),
        (lambda: checks.positive("lr", float("nan")), "must be finite"),
        (lambda: checks.number("lr", "fast"), "lr is 'fast'; it must be a number"),
        (lambda: checks.nonnegative("wd", -0.1), "at least 0"),
        (lambda: checks.one_of("kind", "a", ("b", "c")), "kind is 'a'; it must be one of 'b', 'c'"),
        (lambda: checks.fraction("ratio", 0), r"ratio is 0; it must lie in \(0, 1\]"),
        (lambda: checks.fraction("ratio", 1, one=False), r"must lie in \(0, 1\)"),
        (
            lambda: checks.finite("x", torch.tensor([1.0, float("inf")])),
            "x has 1 NaN or infinite values of 2",
        ),
        (
            lambda: checks.finite("x", torch.tensor([float("inf"), -float("inf"), 1.0])),
            "x has 2 NaN or infinite",
        ),
        (lambda: checks.floating("x", torch.ones(2).byte()), r"x is torch.uint8 of shape \(2,\)"),
        (lambda: checks.floating("x", torch.ones(0, 2)), "not empty"),
        (lambda: checks.floating("x", torch.tensor([float("nan")])), "x has 1 NaN"),
        (lambda: checks.same_length("a", [1], "b", [1, 2]), "a has 1 entries and b has 2"),
        (lambda: checks.labels("y", torch.tensor([0, 2])), "y has no sample of class 1"),
        (lambda: checks.labels("y", torch.tensor([-1, 0])), "y runs from -1 to 0"),
        (lambda: checks.labels("y", torch.tensor([0, 3]), 3), "must be 0..2 for 3 classes"),
        (lambda: checks.labels("y", torch.tensor([0.0, 1.0])), "whole numbers"),
        (lambda: checks.labels("y", torch.zeros(0, dtype=torch.long)), "y is empty"),
    ],
)
def test_each_refusal_is_one_sentence_that_names_the_argument(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_good_values_come_back():
    assert checks.whole("n", 3.0) == 3
    assert checks.fraction("r", 0, zero=True) == 0
    assert checks.labels("y", torch.tensor([1, 0, 2])) == 3
    assert checks.listing([1, 2, 3, 4, 5, 6, 7]) == "1, 2, 3, 4, 5 and 2 more"
    for x in (torch.tensor([1, 2]), torch.zeros(0), torch.tensor([3e38, 3e38]), torch.full((9,), 6e4).half()):
        assert checks.finite("x", x) is x  # the sum may overflow where no entry does
