"""The draft vocabulary of a run."""

from fledge.console import say, warn
from fledge.data.vocab import DraftVocab, build_vocab
from fledge.drafters.layer_config import LayerConfig
from fledge.train.sources import Source

LITTLE = 0.95  # coverage


def draft_vocabulary(config: LayerConfig, source: Source) -> DraftVocab:
    """The most frequent tokens of the training data, as many as the config has."""
    vocab = build_vocab(source.counts, config.vocab_size, config.draft_vocab_size, source.always)
    say(
        f"draft vocabulary: {config.draft_vocab_size} of {config.vocab_size} tokens cover {vocab.coverage:.2%} of the "
        f"supervised tokens (a ceiling on acceptance)"
    )
    if vocab.coverage < LITTLE:
        warn(f"coverage {vocab.coverage:.1%} is low; raise --draft-vocab-size.")
    return vocab
