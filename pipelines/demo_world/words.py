"""Tokenizers of the demo world: one token per word of its language, option letter or mark.

Words it does not know (the captions of real photographs, say) are spelled out, so that every text survives a round
trip.
"""

import re
import string
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PIECE = r"\n|\([A-F]\)|\w+|[^\w\s]"
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
ROLES = ("system", "user", "assistant")
#: `<s>user: …</s>` per turn; the role word and colon are ordinary words, the end of a turn is the end-of-text token.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant: ' }}{% endif %}"
)


def vocabulary(texts: Iterable[str]) -> list[str]:
    """Every piece that occurs, sorted; role names included."""
    return sorted({piece for text in texts for piece in re.findall(PIECE, text)} | {*ROLES, ":"})


def tokenizer(words: list[str], max_length: int = 1024) -> PreTrainedTokenizerFast:
    """A fast tokenizer over `words` in the usual layout, with a chat template."""
    letters = string.ascii_letters + string.digits + string.punctuation
    spelling = [*letters, *(f"##{letter}" for letter in letters)]
    ids = {word: i for i, word in enumerate(dict.fromkeys([PAD, BOS, UNK, EOS, *words, *spelling]))}
    core = Tokenizer(models.WordPiece(ids, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="removed", invert=True)
    # Words are joined by spaces; marks stick to the word before them.
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
