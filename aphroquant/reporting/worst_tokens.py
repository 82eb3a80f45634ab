"""The worst tokens in their context: what stood before, what followed, what both models expected."""

from __future__ import annotations

from collections.abc import Sequence

from aphroquant.evaluation.worst import TokenProbability, WorstToken
from aphroquant.reporting.markup import Markup, element
from aphroquant.reporting.report import Candidate
from aphroquant.reporting.words import figure, percent

SHOWN = 12  # of each candidate


def worst_tokens(candidate: Candidate) -> Markup | None:
    """The list of one candidate; None where the evaluation has none."""
    worst = candidate.evaluation.worst[:SHOWN]
    if not worst:
        return None
    return element("ol", (_entry(one) for one in worst), class_="worst")


def _entry(one: WorstToken) -> Markup:
    place = f"window {one.window}, position {one.position}"
    context = element(
        "p",
        element("bdi", one.before.lstrip("\n")),
        element("mark", element("bdi", shown(one.token))),
        element("bdi", one.after.rstrip("\n")),
        class_="context",
    )
    return element(
        "li",
        element("p", element("strong", f"KLD {figure(one.kld)}"), element("small", place), class_="place"),
        context,
        element(
            "div", _guesses("base", one.base_top, one), _guesses("candidate", one.model_top, one), class_="guesses"
        ),
    )


def _guesses(whose: str, top: Sequence[TokenProbability], one: WorstToken) -> Markup:
    """A model's most likely tokens, that which followed in the text among them."""
    actual = one.base_probability if whose == "base" else one.model_probability
    entries = list(top)
    if one.token not in [guess.text for guess in top]:
        entries.append(TokenProbability(one.token, actual))
    rows = [
        element(
            "li",
            element("code", element("bdi", shown(guess.text))),
            element(
                "meter", percent(guess.probability), min=0, max=1, value=f"{guess.probability:.4f}", aria_hidden="true"
            ),
            element("span", percent(guess.probability, 1)),
            class_="actual" if guess.text == one.token else None,
        )
        for guess in entries
    ]
    return element("div", element("h5", whose), element("ul", rows) if top else element("p", "logits are not finite"))


def shown(token: str) -> str:
    """The token with its blanks and line ends visible."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"
