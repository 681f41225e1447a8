"""Baselines against scikit-learn put together by hand, and against labels that cannot be learned from."""
import numpy as np, pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from clinllm.core.errors import ModelError
from clinllm.models.baselines import STRENGTHS, MiniLMLogistic, Prevalence, TfidfLogistic

RNG = np.random.default_rng(1); WORDS = np.array("alone wife pain stable clinic missed furosemide walks frame diet".split())
Y = RNG.integers(0, 2, 80); TEXTS = [" ".join(RNG.choice(WORDS, 8)) + (" readmitted" if v and RNG.random() < .8 else "") for v in Y]


def test_tfidf_is_the_plain_pipeline():
    "The same probabilities as vectorizer and regression put together by hand at the chosen strength"
    ours = TfidfLogistic().fit(TEXTS[:60], Y[:60]); strength = ours.model[-1].C
    v = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True); plain = LogisticRegression(C=strength, max_iter=1000).fit(v.fit_transform(TEXTS[:60]), Y[:60])
    assert strength in STRENGTHS
    np.testing.assert_allclose(ours.predict_proba(TEXTS[60:]), plain.predict_proba(v.transform(TEXTS[60:]))[:, 1], atol=1e-4)


def test_words_of_test_notes_are_not_learned():
    assert "xylophone" not in TfidfLogistic().fit(TEXTS, Y).words.vocabulary_


def test_same_seed_same_answer():
    np.testing.assert_array_equal(TfidfLogistic(7).fit(TEXTS, Y).predict_proba(TEXTS), TfidfLogistic(7).fit(TEXTS, Y).predict_proba(TEXTS))


@pytest.mark.parametrize("kind", [Prevalence, TfidfLogistic, MiniLMLogistic])
def test_refusals(kind):
    for texts, y, message in [(["a", "b"], [0, 0], "labels are all 0"), ([], [], "labels are all missing"), (["a"], [0, 1], "one length"), (["a", "b"], [0, np.nan], "0 or 1"), (["a", None], [0, 1], "row 1")]:
        with pytest.raises(ModelError, match=message): kind().fit(texts, y)


@pytest.mark.parametrize("kind", [TfidfLogistic, MiniLMLogistic])
def test_three_rows_are_enough_to_run(kind):
    p = kind().fit(["alone", "wife", "wife"], [1, 0, 0]).predict_proba(["alone", "new words"])
    assert p.shape == (2,) and ((p > 0) & (p < 1)).all() and p[0] > p[1]
