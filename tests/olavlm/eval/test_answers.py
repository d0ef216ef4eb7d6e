"""Answer parsing: what people and models write, and the ways in which published scorers misread it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olavlm.eval.answers import parse_choice

FURNITURE = ["chair", "table", "floor lamp", "lamp"]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("(B)", "B"),
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("b)", "B"),
        ("[B]", "B"),
        ("（B）", "B"),
        ("**B**", "B"),
        ("`(B)`", "B"),
        ("\n (B)\n\n", "B"),
        ("( B )", "B"),
        ("A", "A"),
        ("a", "A"),
        ("A.", "A"),
        ("A\n", "A"),
        ("Answer: B", "B"),
        ("Answer:B", "B"),
        ("answer: b", "B"),
        ("Answer - (B)", "B"),
        ("Answer: **B**", "B"),
        ('{"answer": "B"}', "B"),
        ("\\boxed{B}", "B"),
        ("$\\boxed{\\text{B}}$", "B"),
        ("<answer>B</answer>", "B"),
        ("The answer is (B).", "B"),
        ("The answer is B", "B"),
        ("The answer is B because the table is nearer", "B"),
        ("The answer is A because the chair is nearer", "A"),
        ("The correct option is B.", "B"),
        ("The answer is the option B.", "B"),
        ("The answer is most likely (B)", "B"),
        ("I would choose option B.", "B"),
        ("I think it is option b.", "B"),
        ("Choice b", "B"),
        ("It must be (B), I think.", "B"),
        ("I believe option B", "B"),
        ("The closest is A.", "A"),
        ("It's B", "B"),
        ("(B) because the chair (A) is farther away.", "B"),
        ("B because the chair is farther away", "B"),
        ("B, since the chair is farther", "B"),
        ("B: table", "B"),
        ("B. table", "B"),
        ("B - table", "B"),
        ("B it is", "B"),
        ("(B) table", "B"),
        ("b) the table", "B"),
        ("(B) (B) (B)", "B"),
        ("(B)(B)(B)(B)", "B"),
        ("A A A", "A"),
        ("B\nB\nB", "B"),
        ("Not (A) but (B)", "B"),
        ("The answer is A. Wait, no: the answer is B.", "B"),
        ("Option A is wrong; the answer is B.", "B"),
        ("(A) is wrong. (B) is right.", "B"),
        ("A is incorrect, B is correct.", "B"),
        ("A) isn't the best. B) is.", "B"),
        ("Answer: (A) is wrong. (B) is right.", "B"),
        ("(B) is right. (A) is wrong.", "B"),
        ("Option A is not correct. Option B is.", "B"),
        ("(B) is not wrong.", "B"),
        ("B is correct.", "B"),
        ("A is correct.", "A"),
        ("A is the answer", "A"),
        ("a is right", "A"),
        ("The answer A is the correct one: (A)", "A"),
        ("table", "B"),
        ("Table.", "B"),
        ("The table.", "B"),
        ("It is the table that is closer.", "B"),
        ("The floor lamp is closer", "C"),
        ("A lamp", "D"),
        ("(A) chair\n(B) table\n(C) floor lamp\n(D) lamp\nAnswer: (C)", "C"),
        ("(A) chair (B) table (C) floor lamp (D) lamp\nlamp", "D"),
        ("(D) chair", "D"),
    ],
)
def test_reads(reply: str, answer: str) -> None:
    assert parse_choice(reply, FURNITURE) == answer


@pytest.mark.parametrize(
    "reply",
    [
        "",
        " \n\t",
        "()",
        "…",
        "(E)",
        "E",
        "Answer:",
        "The answer is",
        "A dog is standing in front of it.",
        "A is standing in front of it.",
        "(A) is wrong.",
        "B is incorrect.",
        "(A) is not correct; the answer is blue object",
        "Neither A nor B is right.",
        "A large dog, B-movie style",
        "The answer is a dog.",
        "The answer is A dog on a sofa.",
        "I can't see a picture.",
        "I cannot tell which one is closer.",
        "Sorry, I am unable to say whether it is the chair or not.",
        "It is not the chair.",
        "the chair or the table",
        "(A) or (B)",
        "A or B",
        "(A), (B), (C), (D)",
        "A, B",
        "(A)/(B)",
        "It is not B.",
        "either (A) or (B)",
        "The answer is (A) or (B).",
        "Answer: (A) and (B)",
        "option b or c",
        "as an option a dog",
        "(A) chair (B) table (C) floor lamp (D) lamp",
        "Only answer the option as the output. For example, if your answer is the option A, answer (A).",
        "Cabbage",
        "The tablecloth",
        "An armchair",
        "U.S.A. made",
    ],
)
def test_unanswered(reply: str) -> None:
    assert parse_choice(reply, FURNITURE) is None


def test_numbers_are_matched_as_whole_numbers() -> None:
    counts = ["1", "12", "2", "0"]
    assert parse_choice("12", counts) == "B"
    assert parse_choice("There are 2 of them.", counts) == "C"
    assert parse_choice("There are 1 or 2.", counts) is None
    assert parse_choice("21", counts) is None


def test_choices_with_the_same_text_need_their_letter() -> None:
    assert parse_choice("red", ["red", "red", "blue"]) is None
    assert parse_choice("(B) red", ["red", "red", "blue"]) == "B"


def test_a_blank_choice_has_its_letter_only() -> None:
    """MMStar's options that cannot be told apart, and its placeholders."""
    for reply in ("", ".", "…", "A dog.", "()"):
        assert parse_choice(reply, ["yes", " "]) is None
        assert parse_choice(reply, ["", "", "", ""]) is None
    assert parse_choice("(B) something", ["", "", "", ""]) == "B"


def test_published_defect_10_no_reply_is_answered_by_the_one_before() -> None:
    assert parse_choice("(C)", FURNITURE) == "C"
    assert parse_choice("", FURNITURE) is None


texts = st.lists(st.text(st.characters(categories=["L", "N", "Z"]), min_size=1, max_size=12), min_size=1, max_size=6)


@given(reply=st.text(max_size=200), choices=texts)
def test_any_text_gives_a_letter_of_the_choices_or_none(reply: str, choices: list[str]) -> None:
    assert parse_choice(reply, choices) in {*"ABCDEF"[: len(choices)], None}


@given(
    letter=st.sampled_from("ABCD"),
    template=st.sampled_from(
        [
            "{}",
            "({})",
            "({}).",
            "{})",
            "{}.",
            "Answer: {}",
            "The answer is ({}).",
            "**{}**",
            "[{}]",
            "({}) because of it",
            "the answer is ({}).",
            "Final answer: {}",
            "Option {}.",
            "{}: it is nearer",
        ]
    ),
    lower=st.booleans(),
    pad=st.text(" \n\t", max_size=3),
    times=st.integers(1, 4),
)
def test_every_way_of_naming_a_letter(letter: str, template: str, lower: bool, pad: str, times: int) -> None:
    reply = "\n".join([template.format(letter.lower() if lower else letter)] * times)
    assert parse_choice(pad + reply + pad, FURNITURE) == letter


REFUSALS = ("I cannot tell", "Sorry, I can't see any picture", "I don't know which", "There is no image", "No idea:")


@given(refusal=st.sampled_from(REFUSALS), text=st.sampled_from(["", *FURNITURE]), stop=st.sampled_from(["", ".", " …"]))
def test_a_refusal_is_no_answer_whatever_it_mentions(refusal: str, text: str, stop: str) -> None:
    assert parse_choice(f"{refusal} {text}{stop}", FURNITURE) is None


@given(first=st.sampled_from("ABCD"), second=st.sampled_from("ABCD"), template=st.sampled_from(["{} or {}", "{}/{}"]))
def test_two_options_are_no_answer_and_one_said_twice_is(first: str, second: str, template: str) -> None:
    for stated in ("", "The answer is ", "answer: "):
        reply = stated + template.format(f"({first})", f"({second})")
        assert parse_choice(reply, FURNITURE) == (first if first == second else None)


@given(
    noun=st.from_regex(r"[b-z]{3,8}", fullmatch=True), rest=st.sampled_from(["", " is here.", " and some grass", "!"])
)
def test_the_article_is_never_an_option(noun: str, rest: str) -> None:
    for choices in (["yes", "no"], ["1", "2", "3"]):
        if noun not in {"yes", "for"}:
            assert parse_choice(f"A {noun}{rest}", choices) is None
            assert parse_choice(f"The answer is a {noun}{rest}", choices) is None


@given(index=st.integers(0, 3), upper=st.booleans(), stop=st.sampled_from(["", ".", "!", " \n"]))
def test_a_choice_by_its_text(index: int, upper: bool, stop: str) -> None:
    text = FURNITURE[index].upper() if upper else FURNITURE[index]
    assert parse_choice(text + stop, FURNITURE) == "ABCD"[index]
