import math

import numpy as np
import pytest

from rlhf_nb_utils.ngrams import NGramError, NGramLinear, features, fit_bradley_terry, fit_classifier, words

# zlib.crc32 of the UTF-8 bytes, modulo 4096, worked out once: a hash that differs between processes fails here.
COLUMNS = {"good": 3730, "film": 3618, "good good": 1310, "good film": 1454}


def test_words_are_lower_cased_and_keep_inner_apostrophes_and_marks():
    assert words("It’s GREAT, isn't it?! 'Yes'") == ["it's", "great", "isn't", "it", "?", "!", "yes"]


def test_features_are_log_counts_in_stable_columns_scaled_to_length_one():
    row = features(["Good, good film", ""], 4096).toarray()
    norm = math.sqrt(math.log(3) ** 2 + 3 * math.log(2) ** 2)
    expected = np.zeros((2, 4096))
    for gram, column in COLUMNS.items():
        expected[0, column] = math.log(3 if gram == "good" else 2) / norm
    np.testing.assert_allclose(row, expected, atol=1e-12)


def test_unigrams_alone_on_request():
    assert features(["good good film"], 4096, (1, 1)).indices.tolist() == [COLUMNS["good"], COLUMNS["film"]]


def test_score_is_weight_times_features_plus_bias():
    weight = np.zeros(4096, np.float32)
    weight[COLUMNS["film"]] = 2.0
    model = NGramLinear(weight, bias=-0.5)
    share = math.log(2) / math.sqrt(math.log(3) ** 2 + 3 * math.log(2) ** 2)
    np.testing.assert_allclose(model.score(["good good film", "other"]), [2 * share - 0.5, -0.5])
    assert model.score([]).shape == (0,)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_saved_and_loaded_it_scores_the_same(tmp_path, dtype):
    rng = np.random.default_rng(0)
    model = NGramLinear(rng.normal(size=512).astype(np.float32), 0.25, (1, 3))
    model.save(tmp_path, dtype)
    loaded = NGramLinear.load(tmp_path)
    texts = ["a small film", "not a good one, at all"]
    np.testing.assert_allclose(loaded.score(texts), model.score(texts), atol=1e-6 if dtype == "float32" else 2e-3)
    assert loaded.ngram_range == (1, 3) and loaded.weight.dtype == np.float32


def test_a_folder_that_holds_something_else_gets_one_line(tmp_path):
    with pytest.raises(NGramError, match="make it again"):
        NGramLinear.load(tmp_path)
    NGramLinear(np.zeros(8, np.float32)).save(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(NGramError, match="make it again"):
        NGramLinear.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"n_features": 8', '"n_features": 9'))
    with pytest.raises(NGramError, match="9 features"):
        NGramLinear.load(tmp_path)
    config.write_text('{"model_type": "bert"}')
    with pytest.raises(NGramError, match="'bert' model"):
        NGramLinear.load(tmp_path)


def dense_logistic_gradient(rows, targets, weight, bias, l2):
    """d/dw of mean cross entropy + l2/2 |w|², one example and one feature at a time."""
    gradient, of_bias = [l2 * w for w in weight], 0.0
    for row, target in zip(rows, targets):
        z = bias + sum(x * w for x, w in zip(row, weight))
        residual = (1 / (1 + math.exp(-z)) - target) / len(rows)
        gradient = [g + residual * x for g, x in zip(gradient, row)]
        of_bias += residual
    return gradient, of_bias


def test_with_ratios_the_fit_is_the_optimum_on_columns_scaled_by_log_count_ratios():
    texts = ["good film", "a good one", "bad film", "a bad bad one", "good and bad", "nice"]
    targets, size, l2 = [1.0, 0.9, 0.1, 0.0, 0.4, 1.0], 128, 0.01
    rows = features(texts, size, (1, 1)).toarray()
    # Each word's smoothed share of all words of a class, a word counting once a text, by its text's probability.
    counts = {True: [1.0] * size, False: [1.0] * size}
    for row, target in zip(rows, targets):
        for column in row.nonzero()[0]:
            counts[True][column] += target
            counts[False][column] += 1 - target
    share = {k: np.array(c) / sum(c) for k, c in counts.items()}
    scale = np.abs(np.log(share[True] / share[False]))
    model = fit_classifier(texts, targets, l2, size, (1, 1), ratios=True)
    used = [c for c in range(size) if rows[:, c].any() and scale[c] > 1e-9]
    weight = model.weight[used] / scale[used]
    gradient, of_bias = dense_logistic_gradient(rows[:, used] * scale[used], targets, weight, model.bias, l2)
    assert np.abs(gradient).max() < 1e-5 and abs(of_bias) < 1e-5 and np.abs(weight).max() > 1
    plain = fit_classifier(texts, targets, l2, size, (1, 1))
    assert np.abs(plain.weight - model.weight).max() > 0.1


def test_bradley_terry_fit_is_the_optimum_on_feature_differences():
    chosen = ["good film", "a good one", "bad but good", "good", "nice film"]
    rejected = ["bad film", "a bad one", "bad", "good bad film", "bad film"]
    model = fit_bradley_terry(chosen, rejected, l2=0.01, n_features=64)
    rows = features(chosen, 64).toarray() - features(rejected, 64).toarray()
    gradient, _ = dense_logistic_gradient(rows, [1.0] * 5, model.weight.astype(float), 0.0, 0.01)
    assert max(map(abs, gradient)) < 1e-5
    assert model.bias == 0.0
    assert model.score(["good"])[0] > model.score(["bad"])[0]


def test_swapping_chosen_and_rejected_flips_every_score():
    chosen, rejected = ["good film", "a good one"], ["bad film", "dull"]
    there, back = fit_bradley_terry(chosen, rejected, n_features=256), fit_bradley_terry(rejected, chosen, n_features=256)
    np.testing.assert_allclose(there.weight, -back.weight, atol=1e-5)


def test_classifier_fit_is_the_optimum_with_soft_targets():
    texts, targets = ["good film", "bad film", "good", "dull", "so so"], [0.9, 0.1, 1.0, 0.0, 0.5]
    model = fit_classifier(texts, targets, l2=0.02, n_features=64)
    rows = features(texts, 64).toarray()
    gradient, of_bias = dense_logistic_gradient(rows, targets, model.weight.astype(float), model.bias, 0.02)
    assert max(map(abs, gradient)) < 1e-5 and abs(of_bias) < 1e-5


def test_the_bias_is_not_shrunk():
    model = fit_classifier(["", "", "", ""], [1.0, 1.0, 1.0, 0.0], l2=10.0, n_features=16)
    assert model.bias == pytest.approx(math.log(3), abs=1e-3)


def test_labels_that_do_not_fit_the_texts_are_refused():
    with pytest.raises(NGramError, match="between 0 and 1"):
        fit_classifier(["a"], [2.0])
    with pytest.raises(NGramError, match="got 1"):
        fit_classifier(["a", "b"], [1.0])
    with pytest.raises(NGramError, match="as many chosen"):
        fit_bradley_terry(["a"], [])
