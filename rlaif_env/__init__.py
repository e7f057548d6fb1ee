"""Text generation as a Gymnasium environment, and the vocabulary every room of the project shares.

Importing this registers ``RLAIF/TextGeneration-v0`` and ``RLAIF/TokenGeneration-v0`` and loads no model.
"""

from gymnasium import register

from rlaif_env.api import AssetError, BackendError, DataError, Preference, RewardBackend, RLAIFError, Scores, Tokenizer
from rlaif_env.data.tasks import PromptSource, Task, list_tasks, load_task
from rlaif_env.keywords import Shared

__all__ = [
    "AssetError",
    "BackendError",
    "DataError",
    "Preference",
    "PromptSource",
    "RLAIFError",
    "RewardBackend",
    "Scores",
    "Shared",
    "Task",
    "Tokenizer",
    "list_tasks",
    "load_task",
]

register(
    id="RLAIF/TextGeneration-v0",
    entry_point="rlaif_env.envs.text_generation:TextGeneration",
    vector_entry_point="rlaif_env.envs.text_generation:TextGenerationVector",
)
register(
    id="RLAIF/TokenGeneration-v0",
    entry_point="rlaif_env.envs.token_generation:TokenGeneration",
    vector_entry_point="rlaif_env.envs.token_generation:TokenGenerationVector",
)
