import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.data.tokenizers import train_bpe

TEXT = "the king speaks to a friend about bread and water while rain falls on the old stone house"
WORDS = TEXT.split()
LINES = [f"{a.title()} {b}, {c} {i}.\n" for i, (a, b, c) in enumerate(zip(WORDS, WORDS[3:], WORDS[7:], strict=False))]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A trained tokenizer of 320 tokens; leave it as it is (`fresh` gives one to change)."""
    return train_bpe(iter(LINES * 20), 320)


@pytest.fixture
def fresh() -> PreTrainedTokenizerFast:
    """A tokenizer like `tokenizer`, to give another template or more tokens."""
    return train_bpe(iter(LINES * 20), 320)
