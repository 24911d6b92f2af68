"""Two offline toxicity classifiers, read as data from published packages: a BiLSTM and a linear model.

The BiLSTM (``toxic-comment-classifier``, MIT) gives the six labels of the Jigsaw challenge, which are
Detoxify's; the linear one (``alt-profanity-check``, MIT) gives one probability of profanity and is
independent of it. Both took short comments in training, so that a long text is scored in windows that
overlap by half, and the worst window counts.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alignmerge.engine.faults import BadRequest
from eval.scorers.restricted import Record, read_joblib, read_pickle

Item = TypeVar("Item")
Array = NDArray[np.float64]
LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
LENGTH = 100  # words that either classifier looks at together, as in the BiLSTM's training texts


def windows(items: Sequence[Item], length: int) -> list[Sequence[Item]]:
    """Cut ``items`` into windows of ``length`` that overlap by at least half and cover everything.

    The last window ends where the items end, so only a short sequence gives a short window.
    """
    if len(items) <= length:
        return [items]
    step = max(1, length // 2)
    ends = [*range(length, len(items), step), len(items)]
    return [items[end - length : end] for end in ends]


class KerasTokenizer(NamedTuple):
    """How the BiLSTM's texts become numbers: the rules of the Keras text tokenizer."""

    numbers: Mapping[str, int]
    size: int  # words with this index or above are dropped, like unknown ones
    filters: str  # characters that separate words

    def ids(self, text: str) -> list[int]:
        """Return the numbers of the known words of ``text`` in order."""
        plain = text.lower().translate(str.maketrans(self.filters, " " * len(self.filters)))
        found = map(self.numbers.get, plain.split(" "))  # Keras never numbers the empty word
        return [at for at in found if at is not None and at < self.size]


def read_keras_tokenizer(path: Path) -> KerasTokenizer:
    """Read a pickled Keras ``Tokenizer`` without running its code, or raise ``BadRequest``."""
    names = {
        ("keras.src.legacy.preprocessing.text", "Tokenizer"): Record,
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "defaultdict"): defaultdict,
        ("builtins", "int"): int,
    }
    rules = {"lower": True, "split": " ", "char_level": False, "oov_token": None}
    state = _attributes(path, read_pickle(path, names), rules)
    return KerasTokenizer(state["word_index"], int(state["num_words"]), state["filters"])


class SixLabels(nn.Module):
    """Embedding, bidirectional LSTM, maximum over time, one ReLU layer, six sigmoids; all float32."""

    def __init__(self, words: int, width: int, state: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, state, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(2 * state, hidden)
        self.output = nn.Linear(hidden, len(LABELS))

    def forward(self, ids: Tensor) -> Tensor:
        """Return probabilities (n, 6) for word numbers (n, t); padding is a word too, as in Keras."""
        states, _ = self.lstm(self.embedding(ids))
        probabilities: Tensor = torch.sigmoid(self.output(torch.relu(self.hidden(states.amax(1)))))
        return probabilities


def read_six_labels(path: Path) -> SixLabels:
    """Read the Keras weights in the HDF5 file ``path``; the sizes come from the file.

    Keras keeps an LSTM as kernel (d, 4h), recurrent kernel (h, 4h) and bias (4h), gates in the order
    i, f, c, o, which is torch's i, f, g, o, and its dense kernels transposed. Raises ``BadRequest``
    naming the file if a weight is missing, of another shape or not finite.
    """
    try:
        state = _keras_state(path)
        words, width = state["embedding.weight"].shape
        hidden, both = state["hidden.weight"].shape
        network = SixLabels(words, width, both // 2, hidden)
        network.load_state_dict(state)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise BadRequest.of(path.name, f"not read: {error}", "the published BiLSTM weights") from None
    if not all(bool(weight.isfinite().all()) for weight in state.values()):
        raise BadRequest.of(path.name, "a weight is not finite", "finite numbers")
    return network.eval()


def _keras_state(path: Path) -> dict[str, Tensor]:
    import h5py

    with h5py.File(path) as file:

        def weight(name: str) -> Tensor:
            return torch.tensor(np.asarray(file[f"layers/{name}"], dtype=np.float32))

        state = {"embedding.weight": weight("embedding/vars/0")}
        for layer, ours in (("dense", "hidden"), ("dense_1", "output")):
            state[f"{ours}.weight"] = weight(f"{layer}/vars/0").T
            state[f"{ours}.bias"] = weight(f"{layer}/vars/1")
        for way, suffix in (("forward_layer", ""), ("backward_layer", "_reverse")):
            cell = f"bidirectional/{way}/cell/vars"
            state[f"lstm.weight_ih_l0{suffix}"] = weight(f"{cell}/0").T
            state[f"lstm.weight_hh_l0{suffix}"] = weight(f"{cell}/1").T
            state[f"lstm.bias_ih_l0{suffix}"] = weight(f"{cell}/2")
            state[f"lstm.bias_hh_l0{suffix}"] = torch.zeros_like(weight(f"{cell}/2"))
    return state


@lru_cache(maxsize=1)
def read_bilstm(folder: Path) -> tuple[SixLabels, KerasTokenizer]:
    """Read the network and its tokenizer; raises ``BadRequest`` if they do not fit each other."""
    network = read_six_labels(folder / "model.weights.h5")
    tokenizer = read_keras_tokenizer(folder / "tokenizer.pickle")
    held = network.embedding.num_embeddings
    if tokenizer.size > held:
        allowed = f"at most {held}, as in model.weights.h5"
        raise BadRequest.of("tokenizer.pickle", f"{tokenizer.size} words", allowed)
    return network, tokenizer


@torch.inference_mode()
def six_labels(network: SixLabels, tokenizer: KerasTokenizer, texts: Sequence[str], batch_size: int) -> Array:
    """Return the six probabilities of each text, float64 (n, 6), each the maximum over its windows.

    A text of which the classifier knows no word gives a row of NaN: it was not scored.
    """
    rows, owners = [], []
    for owner, text in enumerate(texts):
        ids = tokenizer.ids(text)
        if ids:
            cut = windows(ids, LENGTH)
            rows += [[0] * (LENGTH - len(window)) + list(window) for window in cut]
            owners += [owner] * len(cut)
    starts = range(0, len(rows), batch_size)
    parts = [network(torch.tensor(rows[start : start + batch_size])) for start in starts]
    return worst(len(texts), owners, parts)


def worst(count: int, owners: Sequence[int], parts: list[Tensor]) -> Array:
    """Return the maximum over the windows of each of ``count`` texts, float64 (count, 6).

    ``parts`` stacked are the windows' probabilities (m, 6), ``owners[j]`` the text of window j; a
    text without a window gets NaN.
    """
    scores = np.full((count, len(LABELS)), np.nan)
    if parts:
        np.fmax.at(scores, np.asarray(owners), torch.cat(parts).double().numpy())
    return scores


class Linear(NamedTuple):
    """TF-IDF and an ensemble of k calibrated linear SVMs over V words, as float64 arrays.

    ``idf`` is (V,), ``weights`` (k, V); ``biases`` and Platt's ``slopes`` a and ``offsets`` b, as in
    1 / (1 + exp(a f + b)), are (k,).
    """

    numbers: Mapping[str, int]
    token: re.Pattern[str]
    idf: Array
    weights: Array
    biases: Array
    slopes: Array
    offsets: Array

    def probability(self, text: str) -> float:
        """Return the mean probability for the worst window; the prior where no word is known."""
        return max(map(self._window, windows(self.token.findall(text.lower()), LENGTH)))

    def _window(self, words: Sequence[str]) -> float:
        counts = Counter(self.numbers[word] for word in words if word in self.numbers)
        at = np.fromiter(counts.keys(), dtype=np.intp, count=len(counts))
        tfidf = np.fromiter(counts.values(), dtype=np.float64, count=len(counts)) * self.idf[at]
        norm = float(np.linalg.norm(tfidf)) or 1.0
        margins = self.weights[:, at] @ (tfidf / norm) + self.biases
        return float(np.mean(1 / (1 + np.exp(self.slopes * margins + self.offsets))))


_SKLEARN = (
    ("sklearn.feature_extraction.text", "TfidfVectorizer"),
    ("sklearn.feature_extraction.text", "TfidfTransformer"),
    ("sklearn.calibration", "CalibratedClassifierCV"),
    ("sklearn.calibration", "_CalibratedClassifier"),
    ("sklearn.calibration", "_SigmoidCalibration"),
    ("sklearn.svm._classes", "LinearSVC"),
)
_SETTINGS = {
    "analyzer": "word", "lowercase": True, "ngram_range": (1, 1), "norm": "l2", "use_idf": True,
    "binary": False, "sublinear_tf": False, "strip_accents": None, "preprocessor": None, "tokenizer": None,
}  # fmt: skip


@lru_cache(maxsize=1)
def read_linear(vectorizer: Path, model: Path) -> Linear:
    """Take a pickled scikit-learn TF-IDF and its calibrated SVMs apart; none of their code runs.

    Raises ``BadRequest`` naming the file if it names anything but the six classes expected or was
    fitted with settings that ``Linear`` does not compute.
    """
    names = dict.fromkeys(_SKLEARN, Record)
    text = _attributes(vectorizer, read_joblib(vectorizer, names), _SETTINGS)
    svms = _attributes(model, read_joblib(model, names), {})
    weights, biases, slopes, offsets = [], [], [], []
    try:
        for member in svms["calibrated_classifiers_"]:
            svm, platt = vars(member.estimator), vars(member.calibrators[0])
            weights.append(svm["coef_"][0])
            biases.append(svm["intercept_"][0])
            slopes.append(platt["a_"])
            offsets.append(platt["b_"])
        linear = Linear(
            text["vocabulary_"], re.compile(text["token_pattern"]), vars(text["_tfidf"])["idf_"],
            np.stack(weights), np.array(biases), np.array(slopes), np.array(offsets),
        )  # fmt: skip
    except (KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
        allowed = "calibrated linear SVMs over TF-IDF"
        raise BadRequest.of(model.name, f"not read: {error}", allowed) from None
    if linear.weights.shape[1] != len(linear.idf) or len(linear.numbers) != len(linear.idf):
        raise BadRequest.of(model.name, "not as many words as the vectorizer", "the published pair")
    return linear


def _attributes(path: Path, record: object, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``record`` holds, refusing one that differs from ``expected`` in these attributes."""
    if not isinstance(record, Record):
        raise BadRequest.of(path.name, f"holds a {type(record).__name__}", "the object as published")
    state = vars(record)
    given, allowed = [], []
    for key, value in expected.items():
        if key not in state or state[key] != value:
            given.append(f"{key}={state.get(key)!r}")
            allowed.append(f"{key}={value!r}")
    if given:
        raise BadRequest.of(path.name, ", ".join(given), ", ".join(allowed))
    return state
