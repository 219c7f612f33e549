"""The format of vLLM's TurboQuant cache."""

from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

__all__ = ["TurboQuantConfig", "get_centroids"]
