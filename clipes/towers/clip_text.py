"""Prompts to unit text features (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer

from clipes.errors import VocabularyError
from clipes.types import Float32Array, Progress

CONTEXT_LENGTH = 77
"""Tokens a CLIP text tower reads, start and end of text among them."""

_PROMPTS_AT_ONCE = 64


def tokenize(text: str) -> list[str]:
    """Return the pieces CLIP reads of a text, which may be none, without start and end of text.

    The last piece of a word ends in ``</w>``; pieces are written byte by byte, so that those of
    letters beyond ASCII look odd.
    """
    tokenizer = _tokenizer()
    return [tokenizer.decoder[token] for token in tokenizer.encode(text)]


@torch.inference_mode()
def encode_prompts(
    text: TextTransformer,
    prompts: Sequence[str],
    progress: Progress = lambda _done, _total: None,
) -> Float32Array:
    """Encode prompts with CLIP's text tower.

    A prompt's feature is read at its end, and attention only looks back, so what follows the end
    changes nothing: batches are cut to their longest prompt. Prompts are batched by length, then
    alphabetically, so that the order they are given in does not even change the last bit.

    Args:
        text: The tower.
        prompts: n sentences.
        progress: Called after each batch.

    Returns:
        (n, E) float32, each row of length 1.

    Raises:
        VocabularyError: A prompt is longer than the tower's context.
    """
    tokenizer = _tokenizer()
    lengths = {prompt: len(tokenizer.encode(prompt)) + 2 for prompt in prompts}
    for prompt, length in lengths.items():
        if length > text.context_length:
            raise VocabularyError(
                f"the prompt '{prompt[:60]}...' has {length} tokens, CLIP reads "
                f"{text.context_length}",
                "shorten its words or synonyms",
            )
    unique = sorted(lengths, key=lambda prompt: (lengths[prompt], prompt))
    device = text.positional_embedding.device
    batches = []
    for start in range(0, len(unique), _PROMPTS_AT_ONCE):
        batch = unique[start : start + _PROMPTS_AT_ONCE]
        tokens = tokenizer(batch, context_length=lengths[batch[-1]]).to(device)
        batches.append(F.normalize(_forward(text, tokens).float()).cpu())
        progress(start + len(batch), len(unique))
    row = {prompt: index for index, prompt in enumerate(unique)}
    features: Float32Array = torch.cat(batches)[[row[prompt] for prompt in prompts]].numpy()
    return features


class ContextEncoder:
    """Names behind vectors that are learnt, through the frozen tower (CoOp, Zhou et al. 2022).

    Args:
        text: The tower; its weights get no gradient from now on.
        names: n names.

    Attributes:
        width: W, channels of a vector.
    """

    def __init__(self, text: TextTransformer, names: Sequence[str]) -> None:
        self._text = text.requires_grad_(False)
        self.width = int(text.positional_embedding.shape[1])
        tokenizer = _tokenizer()
        longest = 2 + max(len(tokenizer.encode(name)) for name in names)
        tokens = tokenizer(list(names), context_length=min(longest, text.context_length))
        self._tokens = tokens.to(text.positional_embedding.device)

    def ends(self, contexts: int) -> torch.Tensor:
        """Return the (n,) positions of the ends of text behind so many vectors."""
        return _ends(self._tokens) + contexts

    def __call__(self, contexts: torch.Tensor) -> torch.Tensor:
        """Return the features (n, E) of start, contexts, name and end; not of length 1.

        Args:
            contexts: (P, W).

        Raises:
            VocabularyError: With them a name is longer than the tower's context.
        """
        text, count = self._text, len(contexts)
        length = self._tokens.shape[1] + count
        if length > text.context_length:
            raise VocabularyError(
                f"{count} learnt vectors and the longest class name have {length} tokens, CLIP "
                f"reads {text.context_length}",
                "shorten the names of classes",
            )
        words = text.token_embedding(self._tokens)
        between = contexts.to(words.dtype).expand(len(words), -1, -1)
        hidden = torch.cat([words[:, :1], between, words[:, 1:]], 1)
        return _read(text, hidden, self.ends(count))


def _forward(text: TextTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """Run the tower on (n, L) tokens to (n, E)."""
    return _read(text, text.token_embedding(tokens), _ends(tokens))


def _ends(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.argmax(-1)  # the end of text has the highest number


def _read(text: TextTransformer, words: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Run the tower on (n, L, W) embedded tokens; its own forward takes no L below its context."""
    length = words.shape[1]
    hidden = words + text.positional_embedding[:length]
    hidden = text.ln_final(text.transformer(hidden, attn_mask=text.attn_mask[:length, :length]))
    features: torch.Tensor = hidden[torch.arange(len(words)), ends] @ text.text_projection
    return features


@cache
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer(context_length=CONTEXT_LENGTH)
