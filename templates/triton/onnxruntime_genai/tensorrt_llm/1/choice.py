"""The next token of one request: the likeliest, or drawn as it asks, without those that are forbidden."""

import numpy as np

_MANY = 512


class Choice:
    """How one request's tokens are chosen."""

    def __init__(self, *, temperature=1.0, top_k=0, top_p=0.0, seed=None, penalty=1.0):
        if temperature < 0 or not 0 <= top_p <= 1 or top_k < 0:
            raise ValueError("temperature and top_k must not be negative, and top_p is from 0 to 1")
        if penalty <= 0:
            raise ValueError("repetition_penalty must be more than 0")
        self.draws = temperature > 0 and (top_k > 1 or (top_k == 0 and top_p > 0))
        self.penalty = penalty
        self._temperature, self._top_k, self._top_p = temperature, top_k, top_p or 1.0
        self._numbers = np.random.default_rng(seed) if self.draws else None

    def keeps(self, likeliest, forbidden=()):
        """Whether it is the likeliest token without more ado."""
        return not self.draws and self.penalty == 1.0 and likeliest not in forbidden

    def take(self, logits, seen, forbidden=()):
        """A token, by the logits of all, where it is not kept; `seen` are those of the prompt and the answer."""
        logits = logits.copy()
        if self.penalty != 1.0:
            known = np.unique(np.fromiter((t for t in seen if t < len(logits)), np.int64))
            found = logits[known]
            logits[known] = np.where(found < 0, found * self.penalty, found / self.penalty)
        logits[list(forbidden)] = -np.inf
        return self._drawn(logits) if self.draws else int(logits.argmax())

    def _drawn(self, logits):
        """By chance among the top_k likeliest, of those the likeliest that are together top_p likely."""
        tokens = np.arange(len(logits))
        if 0 < self._top_k < len(logits):
            tokens = np.argpartition(logits, -self._top_k)[-self._top_k :]
        found = logits[tokens].astype(np.float64) / self._temperature
        likely = np.exp(found - found.max())
        likely /= likely.sum()
        if self._top_p < 1:
            order = self._first(likely)
            enough = int(np.searchsorted(np.cumsum(likely[order]), self._top_p)) + 1
            tokens, likely = tokens[order[:enough]], likely[order[:enough]]
        sums = np.cumsum(likely)
        place = np.searchsorted(sums, self._numbers.random() * sums[-1], side="right")
        return int(tokens[min(int(place), len(tokens) - 1)])

    def _first(self, likely):
        """The likeliest in their order: so many as are together top_p likely, or more."""
        if len(likely) > _MANY:  # to sort them all takes longer than a token may
            some = np.argpartition(likely, -_MANY)[-_MANY:]
            if likely[some].sum() >= self._top_p:
                return some[np.argsort(-likely[some], kind="stable")]
        return np.argsort(-likely, kind="stable")
