"""The Flask example as the demo serves it, with scikit-learn imported before the first request.

So the memory in use at the start is what the server takes without any model.
"""

import joblib  # noqa: F401 - imported for its memory
import sklearn.ensemble
import sklearn.kernel_approximation
import sklearn.linear_model
import sklearn.neighbors
import sklearn.pipeline  # noqa: F401 - imported for its memory
from flask_app import create_app

app = create_app()
