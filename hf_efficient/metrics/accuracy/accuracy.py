"""Share of right answers, as an `evaluate` module: `evaluate.load("hf_efficient/metrics/accuracy")`."""

from typing import Any

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference, from scikit-learn; classes are numbers or words."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = [datasets.Value("int64"), datasets.Value("string")]
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference, from 0 to 1 (higher is better).",
            citation="https://scikit-learn.org/stable/modules/generated/sklearn.metrics.accuracy_score.html",
            inputs_description="predictions, references: classes, all numbers or all words.",
            features=[datasets.Features({"predictions": kind, "references": kind}) for kind in kinds],
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        """Compare.

        Args:
            predictions (`list[int]` or `list[str]`): Answers.
            references (`list[int]` or `list[str]`): What they should be.

        Returns:
            `dict[str, float]`: `accuracy`.

        Raises:
            ImportError: If scikit-learn is not installed.
        """
        try:
            from sklearn.metrics import accuracy_score
        except ImportError as error:
            raise ImportError('accuracy needs scikit-learn; run pip install "hf-efficient[quickstart]".') from error

        return {"accuracy": float(accuracy_score(references, predictions))}
