"""What is really wanted here: a few different long words, said once, in about eight words. Known in closed form.

    gold = (1 - exp(-d / 3)) × (1 - r)² × exp(-((w - 8) / 6)² / 2)

w: words of the answer; d: different words of seven letters or more; r: the share of words that stood before. Between 0
and 1. Each factor alone can be had cheaply, and each takes the others away: a long word more is worth less and less,
the same one again costs, and so does going on.
"""

import math
import re

LONG = 7  # letters


def gold(prompts, responses, rows):
    """One number an answer, whatever was asked: the form that ppo's rewards have."""
    return [worth(response) for response in responses]


def worth(text):
    """The gold reward of one answer."""
    words = re.findall(r"[a-z]+", text.lower())
    if not words:
        return 0.0
    long_words = len({word for word in words if len(word) >= LONG})
    repeated = 1 - len(set(words)) / len(words)
    return (1 - math.exp(-long_words / 3)) * (1 - repeated) ** 2 * math.exp(-(((len(words) - 8) / 6) ** 2) / 2)
