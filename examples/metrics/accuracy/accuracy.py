"""Share of correct predictions, as an `evaluate` metric that needs no download."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """`compute(predictions, references)` -> `{"accuracy": share in [0, 1]}`"""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description=Accuracy.__doc__, features=features
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
