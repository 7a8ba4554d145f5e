"""Use of a trained model. `load` finds one (loading.py), `Model` answers with it (model.py), and what it asks of the
composite is in runner.py: prompts in shared rows, and the state that an answer is decoded from.
"""

from mmit.data.prompts import as_prompt, ask
from mmit.generate.loading import Loading, load
from mmit.generate.model import Answering, Completion, Likelihood, Model
from mmit.generate.runner import Usage

__all__ = ["Answering", "Completion", "Likelihood", "Loading", "Model", "Usage", "as_prompt", "ask", "load"]
