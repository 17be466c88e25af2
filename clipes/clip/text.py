"""Prompts to unit text features (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer

from clipes.errors import VocabularyError
from clipes.types import Float32Array

_PROMPTS_AT_ONCE = 64


@torch.inference_mode()
def encode_prompts(text: TextTransformer, prompts: Sequence[str]) -> Float32Array:
    """Encode prompts with CLIP's text tower.

    Args:
        text: The tower.
        prompts: n sentences.

    Returns:
        (n, E) float32, each row of length 1.

    Raises:
        VocabularyError: A prompt is longer than the tower's context.
    """
    tokenizer = SimpleTokenizer(context_length=text.context_length)
    for prompt in prompts:
        length = len(tokenizer.encode(prompt)) + 2  # start and end of text
        if length > text.context_length:
            raise VocabularyError(
                f"the prompt '{prompt[:60]}...' has {length} tokens, CLIP reads "
                f"{text.context_length}",
                "shorten its words or synonyms",
            )
    device = text.positional_embedding.device
    batches = [
        F.normalize(text(tokenizer(prompts[start : start + _PROMPTS_AT_ONCE]).to(device)).float())
        for start in range(0, len(prompts), _PROMPTS_AT_ONCE)
    ]
    features: Float32Array = torch.cat(batches).cpu().numpy()
    return features
