"""Which option a free-form reply means, or that it means none.

Published scorers read an empty reply as "A" or keep the previous row's answer; here what cannot be read is unanswered.
"""

import re
import unicodedata
from collections.abc import Sequence
from string import ascii_uppercase

#: Kept beside every reply; raise it whenever a reply could be read differently than before.
PARSER_VERSION = 3

# A bare letter is an option only where no article, pronoun or initial can stand: before the end, punctuation, a reason,
# a verdict. Upper-case letters that are no English word may also stand before any word ("B it is").
_RIGHT = r"(?:the\s+)?(?:correct|right|answer|best)\b"
_ENDS = rf"(?=\s*(?:$|[.,;:)\]}}!?\"\n]|[-–—]\s|(?:because|since|as|for)\b|is\s+{_RIGHT}))"
_LETTER = (
    r"(?:[(\[{]\s*(?P<bracketed>[A-Za-z])\s*[)\]}]"
    rf"|(?<![\w'’-])(?:(?P<bare>[A-Za-z]){_ENDS}|(?P<capital>(?-i:[B-HJ-Z]))(?=\s)))"
)

_STATED = re.compile(
    r"(?:\b(?:answer|choice|option|letter)[\"'”]?\s*(?:(?:is|was|would be|should be|must be)\b|[:=])"
    r"|\b(?:choose|pick|select|go with)\b|\\boxed)"
    r"(?:\s*(?:the|most|likely|probably|clearly|definitely|correct|option|choice|letter)\b)*[\s:={\"'“]*" + _LETTER,
    re.IGNORECASE,
)
_LEADING = re.compile(r"\W*?" + _LETTER, re.IGNORECASE)
_MARKED = re.compile(
    rf"[(\[]\s*([A-Za-z])\s*[)\]]|\b(?:option|choice)\s+((?-i:[A-Z])\b|[A-Za-z]{_ENDS})"
    r"|(?<=\s)(?<!or )(?<!and )(?<!as )((?-i:[A-Z]))(?=[.!]?\Z)",
    re.IGNORECASE,
)
_NAMED = r"(?:[(\[]\s*[A-Za-z]\s*[)\]]|(?<![\w'’-])(?-i:[A-Z])\b)"
_RULED_OUT = re.compile(
    r"(?:\bnot|n['’]t|\bneither|\bnor|\bnever|\bthan)\s+(?:the\s+)?(?:answer\s+|option\s+|choice\s+)?"
    rf"{_NAMED}|{_NAMED}\)?\s+is(?:\s+(?:wrong|incorrect|false)\b|(?:\s+not|n['’]t)\s+{_RIGHT})",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(r"\s*(?:,|/|&|or\b|and\b)?\s*" + _LETTER, re.IGNORECASE)
_OR = re.compile(r"\s*(?:/|&|or\b|and\b)\s*" + _LETTER, re.IGNORECASE)  # after a statement that would do by itself
_NEGATED = re.compile(r"\b(?:no|not|nor|neither|none|never|cannot|unable|unclear|unsure)\b|n['’]t\b", re.IGNORECASE)
_ECHOED_EXAMPLE = re.compile(r"(?:for example,?\s*)?\bif your answer is[^.]*\.?", re.IGNORECASE)


def parse_choice(reply: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that `reply` names, or None if it names none or more than one.

    The first of these that finds an option decides; 2 to 4 pass over what is ruled out ("not (A)", "(A) is wrong"):

    1. the reply is nothing but one letter, or nothing but one choice's text;
    2. the last explicit statement: "the answer is (B)", "Answer: B", "I choose B";
    3. a leading option: "(B) because …", "b) the chair", "A is correct";
    4. the only option marked anywhere, or a last bare letter: "It must be (B)", "The closest is B.";
    5. the only choice whose text occurs, in a reply that negates nothing: "It is the chair."

    An "A" is an option only where it cannot be the article. Letters beyond the choices are never options; echoes of the
    list of choices and of the prompt's example ("if your answer is the option A, answer (A)") are ignored.

    Args:
        reply: what the model wrote, without special tokens.
        choices: the texts behind (A), (B), …; at most 26. A blank one has its letter only.
    """
    letters = ascii_uppercase[: len(choices)]
    texts = [_plain(choice).casefold().strip(" .") for choice in choices]
    text = _ECHOED_EXAMPLE.sub(" ", _without_listing(_plain(reply), texts)).strip()
    words: set[str] = {word.upper() for word in re.findall(r"\w+", text)}
    if len(words) == 1 and (word := words.pop()) in set(letters):
        return word
    bare = text.casefold().strip(" .,;:!?\"'()[]")
    if bare and texts.count(bare) == 1:
        return letters[texts.index(bare)]

    left = _RULED_OUT.sub(" ", text)
    stated = [match for match in _STATED.finditer(left) if _letter(match) in set(letters)]
    if stated:
        return _alone(stated[-1], _OR, letters)
    leading = _LEADING.match(left)
    if leading and _letter(leading) in set(letters):
        return _alone(leading, _ALTERNATIVE, letters)
    marked: set[str] = {max(groups).upper() for groups in _MARKED.findall(left)} & set(letters)
    if marked:
        return marked.pop() if len(marked) == 1 else None
    if not _NEGATED.search(text):
        mentioned = _mentioned(text.casefold(), texts)
        if len(mentioned) == 1 and texts.count(texts[mentioned[0]]) == 1:
            return letters[mentioned[0]]
    return None


def _plain(text: str) -> str:
    """Without Markdown, TeX and XML marks, in compatibility form (full-width brackets become ordinary ones)."""
    return re.sub(r"[*_`#$]|\\text\b|</?[A-Za-z]\w*>", "", unicodedata.normalize("NFKC", text)).strip()


def _letter(match: re.Match[str]) -> str:
    """The option letter of a `_LETTER` match, in upper case."""
    return str(match["bracketed"] or match["bare"] or match["capital"]).upper()


def _alone(match: re.Match[str], another: re.Pattern[str], letters: str) -> str | None:
    """The option of a `_LETTER` match, None if `another` one of `letters` follows."""
    letter, second = _letter(match), another.match(match.string, match.end())
    return None if second and _letter(second) in set(letters) - {letter} else letter


def _without_listing(text: str, texts: list[str]) -> str:
    """`text` without an echo of the whole list "(A) first (B) second …"."""
    if len(texts) < 2:
        return text
    items = (
        rf"[(\[]?{letter}[)\].:]\s*{re.escape(choice)}" for letter, choice in zip(ascii_uppercase, texts, strict=False)
    )
    return re.sub(r"\W+?".join(items), " ", text, flags=re.IGNORECASE)


def _mentioned(text: str, texts: list[str]) -> list[int]:
    """Indices of the choices whose text occurs as whole words; a choice inside a longer one does not count."""
    found = []
    for index in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
        if not texts[index]:
            continue
        text, times = re.subn(rf"(?<!\w){re.escape(texts[index])}(?!\w)", "\0", text)
        if times:
            found.append(index)
    return found
