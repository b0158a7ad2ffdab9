"""Every measure against a value worked out by hand, a loop over its definition, and the ends of the number range."""

import itertools
import math
import subprocess
import sys
import typing
import zlib
from dataclasses import replace
from decimal import Decimal, localcontext

import numpy as np
import pytest

from llm_unlearn.evaluation.distribution import Entropy, KnowledgeGap
from llm_unlearn.evaluation.extraction import (
    DiscoverableExtraction,
    LeakAtK,
    PrefixExtraction,
    extraction_curve,
    log_miss,
)
from llm_unlearn.evaluation.membership import Membership, PrivLeak, auc, tpr
from llm_unlearn.evaluation.membership_attacks import (
    AnyMembershipAttack,
    GradientNorm,
    Loss,
    MinK,
    MinKPlusPlus,
    Neighbourhood,
    ReCaLL,
    Reference,
    Zlib,
)
from llm_unlearn.evaluation.memorization import (
    ExactMemorization,
    ExtractionStrength,
    ForgetQuality,
    MeasureKind,
    Perplexity,
    Probability,
    TruthRatio,
)
from llm_unlearn.evaluation.numbers import sample_of
from llm_unlearn.evaluation.suite import AnyMeasure
from llm_unlearn.evaluation.tables import Cut, Draws, Likelihood, Neighbours, Sampler, SetTable, Shots, Unavailable
from llm_unlearn.evaluation.text import ExactMatch, Fluency, KeywordRecall, Rouge, broken, gram_entropy, names, repetition, rouge_l
from llm_unlearn.evaluation.utility import ModelUtility, MultipleChoice, OptionProbability

log = math.log


def make(*rows, truth=None, generated=None, mean=-1.0, std=1.0, more=None, **facts):
    """A table from rows: {kind: log p of one answer, or of several}, and the answer's hits as `hit` (default: none).

    `more` are further columns per token, `facts` further fields of the table.
    """
    row, kind, pieces, hits = [], [], [], []
    for i, one in enumerate(rows):
        for name, values in one.items():
            if name == "hit":
                continue
            for answer in values if isinstance(values[0], (list, tuple)) else [values]:
                row.append(i)
                kind.append(name)
                pieces.append(np.array(answer, dtype=float))
                own = one.get("hit", [0] * len(answer))[: len(answer)] if name in ("answer", "peer") else [0] * len(answer)
                hits.append(np.array(own, bool))
    n = sum(map(len, pieces))
    start = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    return SetTable(
        [str(i) for i in range(len(rows))],
        ["?"] * len(rows),
        truth or [f"answer {i}" for i in range(len(rows))],
        Likelihood(
            np.array(row),
            np.array(kind),
            start,
            np.concatenate(pieces),
            np.concatenate(hits),
            np.broadcast_to(np.asarray(mean, dtype=float), (n,)),
            np.broadcast_to(np.asarray(std, dtype=float), (n,)),
            more or {},
        ),
        generated,
        **facts,
    )


def random_rows(seed, count=30, scale=1.0, wrong=3):
    """Rows with a paraphrase for two in three and `wrong` wrong answers, of 1 to 12 tokens each."""
    rng = np.random.default_rng(seed)

    def answer():
        return list(-rng.exponential(scale, rng.integers(1, 13)))

    rows = []
    for i in range(count):
        one = {"answer": answer()}
        one["hit"] = list(rng.random(len(one["answer"])) < 0.7)
        if i % 3:
            one["paraphrase"] = answer()
        one["perturbed"] = [answer() for _ in range(wrong)]
        rows.append(one)
    return rows


def value(measure, table, retrained=None, **others):
    return measure({"forget": table, **others}, None if retrained is None else {"forget": retrained}).value


# ------------------------------------------------------------------------------------------------ likelihood


def test_perplexity_weighs_tokens_and_probability_weighs_answers():
    table = make({"answer": [log(0.5)]}, {"answer": [log(0.125)] * 3})
    assert value(Perplexity(set="forget"), table) == pytest.approx(2 ** (10 / 4))
    assert value(Probability(set="forget"), table) == pytest.approx((0.5 + 0.125) / 2)
    assert Perplexity(set="forget")({"forget": table}, None).rows == pytest.approx([2, 8])


def test_a_collapsed_model_has_a_finite_perplexity_and_no_probability():
    table = make({"answer": [-1e5, -1e5]}, {"answer": [-1e5]})
    sample = Perplexity(set="forget")({"forget": table}, None)
    assert sample.value == sample.bootstrap()[1] == math.exp(709)
    assert value(Probability(set="forget"), table) == 0


@pytest.mark.parametrize(
    ("hit", "exact", "strength", "peer"),
    [
        ([1, 1, 1, 1], 1, 1, (1, 1)),
        ([0, 0, 0, 0], 0, 0, (0, 1 / 3)),
        ([1, 1, 1, 0], 3 / 4, 0, (1, 1)),
        ([0, 0, 0, 1], 1 / 4, 1 / 4, (0, 1 / 3)),
        ([1, 0, 1, 1], 3 / 4, 1 / 2, (2 / 3, 1 / 3)),
        ([1], 1, 1, (None, 0)),
        ([0], 0, 0, (None, 0)),
    ],
)
def test_exact_memorization_and_extraction_strength_of_one_answer(hit, exact, strength, peer):
    """The peer leaves out the last token: it reads nothing of an answer of one, which it does not count, or counts as 0."""
    table = make({"answer": [-1.0] * len(hit), "hit": hit} | ({"peer": [-1.0] * (len(hit) - 1)} if len(hit) > 1 else {}))
    assert value(ExactMemorization(set="forget"), table) == exact
    assert value(ExtractionStrength(set="forget"), table) == strength
    assert value(ExtractionStrength(set="forget", variant="peer"), table) == pytest.approx(peer[1])
    if peer[0] is None:
        with pytest.raises(Unavailable, match="no answer has a token that OpenUnlearning counts"):
            value(ExactMemorization(set="forget", variant="peer"), table)
    else:
        assert value(ExactMemorization(set="forget", variant="peer"), table) == peer[0]


def test_likelihood_measures_equal_their_definitions_on_random_tables():
    rows = random_rows(0)
    table = make(*rows)
    nll = [-sum(row["answer"]) for row in rows]
    length = [len(row["answer"]) for row in rows]
    strengths = []
    for row in rows:
        k = 0
        while k < len(row["hit"]) and not all(row["hit"][k:]):
            k += 1
        strengths.append(1 - k / len(row["hit"]))
    expected = {
        Perplexity: math.exp(sum(nll) / sum(length)),
        Probability: sum(math.exp(-a / t) for a, t in zip(nll, length, strict=True)) / len(rows),
        ExactMemorization: sum(sum(row["hit"]) / len(row["hit"]) for row in rows) / len(rows),
        ExtractionStrength: sum(strengths) / len(rows),
    }
    for kind, number in expected.items():
        assert value(kind(set="forget"), table) == pytest.approx(number, rel=1e-12), kind


# ------------------------------------------------------------------------------------------------ truth ratio


def truth_ratios(rows, wrong_mean):
    """R of every row in 60 decimal digits, where exp(−100 000) is a number like any other."""
    with localcontext() as context:
        context.prec = 60

        def probability(logps):
            return (sum(map(Decimal, logps)) / len(logps)).exp()

        ratios = []
        for row in rows:
            wrong = [probability(one) for one in row["perturbed"]]
            if wrong_mean == "arithmetic":
                top = sum(wrong) / len(wrong)
            else:
                top = (sum(one.ln() for one in wrong) / len(wrong)).exp()
            ratios.append(top / probability(row.get("paraphrase", row["answer"])))
        return ratios


AGGREGATES = {
    "closer_to_one_better": lambda r: min(r, 1 / r),
    "true_better": lambda r: max(0, 1 - r),
    "prob_mean": lambda r: 1 / (1 + r),
}


@pytest.mark.parametrize(
    ("wrong_mean", "aggregate", "expected"),
    [
        ("arithmetic", "closer_to_one_better", 0.34 / 0.8),
        ("arithmetic", "true_better", 1 - 0.34 / 0.8),
        ("arithmetic", "prob_mean", 0.8 / (0.8 + 0.34)),
        ("geometric", "closer_to_one_better", 0.16 / 0.8),
        ("geometric", "true_better", 1 - 0.16 / 0.8),
        ("geometric", "prob_mean", 0.8 / (0.8 + 0.16)),
    ],
)
def test_truth_ratio_by_hand(wrong_mean, aggregate, expected):
    row = {"answer": [log(0.99)], "paraphrase": [log(0.64), log(1.0)], "perturbed": [[log(0.04)], [log(0.64)] * 2]}
    measure = TruthRatio(set="forget", wrong_mean=wrong_mean, aggregate=aggregate)
    assert value(measure, make(row)) == pytest.approx(expected)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("wrong_mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_truth_ratio_equals_its_definition(wrong_mean, aggregate, scale):
    rows = random_rows(1, scale=scale)
    expected = [float(AGGREGATES[aggregate](ratio)) for ratio in truth_ratios(rows, wrong_mean)]
    sample = TruthRatio(set="forget", wrong_mean=wrong_mean, aggregate=aggregate)({"forget": make(*rows)}, None)
    assert sample.rows == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert sample.value == pytest.approx(sum(expected) / len(rows))


@pytest.mark.parametrize("wrong_mean", ["arithmetic", "geometric"])
def test_truth_ratio_of_a_model_to_which_everything_is_impossible_is_one(wrong_mean):
    table = make(*[{"answer": [-1e5], "perturbed": [[-1e5], [-1e5]]}] * 3)
    for aggregate, expected in {"closer_to_one_better": 1, "true_better": 0, "prob_mean": 0.5}.items():
        measure = TruthRatio(set="forget", wrong_mean=wrong_mean, aggregate=aggregate)
        assert value(measure, table) == pytest.approx(expected, abs=1e-9)


def test_rows_without_wrong_answers_are_left_out_and_none_left_is_said():
    measure = TruthRatio(set="forget", aggregate="prob_mean")
    sample = measure({"forget": make({"answer": [-1.0]}, {"answer": [-1.0], "perturbed": [[-1.0]]})}, None)
    assert (sample.n, sample.value, sample.rows) == (1, 0.5, None)
    for kind in (measure, MultipleChoice(set="forget"), OptionProbability(set="forget"), ForgetQuality(set="forget")):
        with pytest.raises(Unavailable, match="'forget': none of its 1 rows has wrong answers"):
            value(kind, make({"answer": [-1.0]}), make({"answer": [-1.0]}))


def test_forget_quality_is_the_exact_p_value():
    low = make(*[{"answer": [-1.0], "perturbed": [[-5.0 - i / 10]]} for i in range(6)])
    high = make(*[{"answer": [-5.0], "perturbed": [[-1.0 - i / 10]]} for i in range(6)])
    assert value(ForgetQuality(set="forget"), low, low) == 1
    # Two samples of 6 that do not overlap: 2 of the C(12, 6) orders are this far apart.
    assert value(ForgetQuality(set="forget"), low, high) == pytest.approx(2 / math.comb(12, 6))
    assert ForgetQuality(set="forget")({"forget": low}, {"forget": high}).bootstrap() is None


@pytest.mark.parametrize("wrong_mean", ["arithmetic", "geometric"])
def test_forget_quality_equals_scipy_on_plain_ratios(wrong_mean):
    from scipy.stats import ks_2samp

    first, second = random_rows(2, count=40), random_rows(3, count=25, scale=1.5)
    plain = [[float(ratio) for ratio in truth_ratios(rows, wrong_mean)] for rows in (first, second)]
    found = value(ForgetQuality(set="forget", wrong_mean=wrong_mean), make(*first), make(*second))
    assert found == pytest.approx(ks_2samp(*plain).pvalue, rel=1e-9)
    assert 0 < found < 1


def test_forget_quality_without_a_retrained_model_says_what_to_give():
    with pytest.raises(Unavailable, match=r"needs a retrained model.*--retrained PATH.*retrained:"):
        value(ForgetQuality(set="forget"), make(*random_rows(2)))


# ------------------------------------------------------------------------------------------------ membership

ATTACKS = (Loss(), Zlib(), MinK(k=0.4), MinKPlusPlus(k=0.4), Reference())


def flat(*losses):
    """One row per loss, each of five equal tokens."""
    return make(*[{"answer": [-loss] * 5} for loss in losses])


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
@pytest.mark.parametrize(
    ("members", "others", "expected"),
    [((0.1, 0.2, 0.3), (2.0, 2.1, 2.2), 1), ((5.0, 5.1, 5.2), (2.0, 2.1, 2.2), 0), ((2.0, 2.1, 2.2),) * 2 + (0.5,)],
    ids=["recognised", "over-unlearned", "unknown"],
)
def test_auc_is_one_for_a_recognised_set_and_zero_for_a_shunned_one(attack, members, others, expected):
    control = {"forget": flat(2, 2, 2), "holdout": flat(2, 2, 2)}
    measure = Membership(attack=attack, set="forget", against="holdout")
    sample = measure({"forget": flat(*members), "holdout": flat(*others)}, control)
    assert sample.value == pytest.approx(expected)
    recognised = Membership(attack=attack, statistic="tpr", set="forget", against="holdout")
    assert recognised({"forget": flat(*members), "holdout": flat(*others)}, control).value == (expected == 1)


def test_auc_and_tpr_equal_scikit_learn_and_a_loop_with_ties():
    from sklearn.metrics import roc_auc_score, roc_curve

    rng = np.random.default_rng(4)
    for _ in range(20):
        members, others = rng.integers(0, 12, 37).astype(float), rng.integers(2, 15, 220).astype(float)
        truth = np.r_[np.ones(37), np.zeros(220)]
        seen = -np.r_[members, others]
        wins = sum((other > member) + (other == member) / 2 for member in members for other in others)
        assert auc(members, others) == pytest.approx(wins / (37 * 220))
        assert auc(members, others) == pytest.approx(roc_auc_score(truth, seen))
        false, true, _ = roc_curve(truth, seen, drop_intermediate=False)
        for fpr in (0.0, 0.01, 0.3, 0.95):
            assert tpr(members, others, fpr) == pytest.approx(true[false <= fpr + 1e-12].max())


def test_tpr_allows_exactly_one_false_alarm_in_a_hundred():
    others = np.arange(100.0)
    assert tpr(np.array([0.5, 0.5, 1.5, 50.0]), others, 0.01) == 0.5  # one holdout row, 0.0, lies below 0.5; two below 1.5
    assert tpr(np.array([0.5, 0.5, 1.5, 50.0]), others[:99], 0.01) == 0  # 99 rows allow none


def test_attack_scores_equal_their_definitions_on_random_tables():
    rows = random_rows(5)
    rng = np.random.default_rng(6)
    tokens = sum(len(answer) for row in rows for answer in ([row["answer"]] + row["perturbed"]))
    tokens += sum(len(row.get("paraphrase", [])) for row in rows)
    mean, std = -rng.exponential(1, tokens), rng.exponential(1, tokens)
    std[::7] = 0
    truth = ["word " * (i + 1) for i in range(len(rows))]
    table = make(*rows, truth=truth, mean=mean, std=std)
    other = make(*random_rows(7))
    expected = {attack.name: [] for attack in ATTACKS}
    for i, row in enumerate(rows):
        a = next(a for a in range(len(table.likelihood.row)) if table.likelihood.row[a] == i)
        at = range(table.likelihood.start[a], table.likelihood.start[a + 1])
        logps = row["answer"]
        surprise = [(logp - mean[t]) / max(std[t], 1e-3) for logp, t in zip(logps, at, strict=True)]
        count = max(1, math.floor(0.4 * len(logps)))
        loss = -sum(logps) / len(logps)
        unseen = random_rows(7)[i]["answer"]
        expected["loss"].append(loss)
        expected["zlib"].append(loss / len(zlib.compress(truth[i].encode())))
        expected["min_k"].append(-sum(sorted(logps)[:count]) / count)
        expected["min_k++"].append(-sum(sorted(surprise)[:count]) / count)
        expected["reference"].append(loss + sum(unseen) / len(unseen))
    for attack in ATTACKS:
        assert attack(table, "holdout", other) == pytest.approx(expected[attack.name], rel=1e-12), attack


def test_min_k_of_one_token_is_that_token_and_of_all_is_the_loss():
    assert MinK(k=0.01)(make({"answer": [-3.0]}), "holdout", None) == [3]
    table = make(*[{"answer": row["answer"]} for row in random_rows(8)])
    assert MinK(k=1.0)(table, "holdout", None) == pytest.approx(Loss()(table, "holdout", None))


def test_reference_attack_needs_a_retrained_model_with_the_same_rows():
    measure = Membership(attack=Reference(), set="forget", against="holdout")
    tables = {"forget": flat(1, 2), "holdout": flat(1, 2)}
    with pytest.raises(Unavailable, match=r"`reference` needs a retrained model"):
        measure(tables, None)
    with pytest.raises(ValueError, match="different rows"):
        measure(tables, {"forget": flat(1, 2, 3), "holdout": flat(1, 2)})


def test_the_bootstrap_interval_of_an_auc_covers_the_truth():
    truth = 0.5 * (1 + math.erf(0.5))  # P(N(1, 1) > N(0, 1)) = Φ(1/√2)
    rng = np.random.default_rng(9)
    measure = Membership(attack=Loss(), set="forget", against="holdout")
    covered = 0
    for _ in range(60):
        members, others = flat(*(10 + rng.normal(0, 1, 50))), flat(*(10 + rng.normal(1, 1, 50)))
        sample = measure({"forget": members, "holdout": others}, None)
        low, high = sample.bootstrap(100)
        assert low < sample.value < high < low + 0.35
        assert (low, high) == sample.bootstrap(100)
        covered += low <= truth <= high
    assert covered >= 51  # 95 % of 60 is 57


# ------------------------------------------------------------------------------------------------ extraction


def test_prefix_extraction_by_hand():
    rows = [
        {"answer": [-1.0] * 4, "hit": [0, 0, 1, 1]},
        {"answer": [-1.0] * 4, "hit": [1, 1, 1, 0]},
        {"answer": [-1.0] * 2, "hit": [1, 1]},
    ]
    table = make(*rows)
    assert value(PrefixExtraction(set="forget", prefix=2), table) == 1 / 2
    assert value(PrefixExtraction(set="forget", prefix=2, length=1), table) == 1
    assert value(PrefixExtraction(set="forget", prefix=1), table) == 1 / 3
    assert value(PrefixExtraction(set="forget", prefix=0), table) == 1 / 3
    sample = PrefixExtraction(set="forget", prefix=3)({"forget": table}, None)
    assert (sample.n, sample.value, sample.rows) == (2, 0.5, None)
    with pytest.raises(Unavailable, match=r"prefix of 4 tokens \(the longest has 4\)"):
        value(PrefixExtraction(set="forget", prefix=4), table)
    with pytest.raises(Unavailable, match="prefix of 5 tokens"):
        value(DiscoverableExtraction(set="forget", prefix=5), table)


@pytest.mark.parametrize("length", [None, 1, 3])
def test_prefix_extraction_is_what_greedy_decoding_gives(length):
    rng = np.random.default_rng(10)
    after = rng.integers(0, 3, (3, 3))  # the model's first choice after the last two tokens
    rows, same = [], []
    for _ in range(200):
        text = list(rng.integers(0, 3, 2))  # the prompt
        for _ in range(rng.integers(3, 7)):
            text.append(after[text[-2], text[-1]] if rng.random() < 0.8 else rng.integers(0, 3))
        rows.append({"answer": [-1.0] * (len(text) - 2)})
        rows[-1]["hit"] = [after[text[i - 2], text[i - 1]] == text[i] for i in range(2, len(text))]
        decoded, end = text[:4], len(text) if length is None else min(len(text), 4 + length)
        while len(decoded) < end:
            decoded.append(after[decoded[-2], decoded[-1]])
        same.append(decoded == text[:end])
    found = PrefixExtraction(set="forget", prefix=2, length=length)({"forget": make(*rows)}, None)
    assert list(found.rows) == same
    assert 0.1 < found.value < 0.95


def test_discoverable_extraction_by_hand():
    table = make({"answer": [-9.0, log(0.5), log(0.02)]}, {"answer": [-9.0, log(0.5)]}, {"answer": [-9.0, -1e5]})
    # p_z = 0.01, 0.5, 0; 1 − 0.99^68 = .4951, 1 − 0.99^69 = .5002
    for n, expected in {1: 1 / 3, 68: 1 / 3, 69: 2 / 3, 10**18: 2 / 3}.items():
        assert value(DiscoverableExtraction(set="forget", prefix=1, n=n), table) == pytest.approx(expected)
    assert value(DiscoverableExtraction(set="forget", prefix=1, length=1, n=1), table) == pytest.approx(2 / 3)
    certain = make({"answer": [-9.0, 0.0]}, {"answer": [-9.0, 1e-9]})
    assert value(DiscoverableExtraction(set="forget", prefix=1, n=1, p=0.999), certain) == 1


def test_extraction_curve_equals_its_definition_and_the_measure():
    rows = [row for row in random_rows(11, count=60, scale=2.0)]
    ns = [1, 10, 1000, 10**6, 10**12, 10**18]
    curve = extraction_curve(make(*rows), 2, ns, 0.3)
    for n, found in zip(ns, curve, strict=True):
        with localcontext() as context:
            context.prec = 80
            p_z = [sum(map(Decimal, row["answer"][2:])).exp() for row in rows if len(row["answer"]) > 2]
            expected = sum(1 - (1 - p) ** n >= Decimal("0.3") for p in p_z) / len(p_z)
        assert found == pytest.approx(expected)
        assert found == value(DiscoverableExtraction(set="forget", prefix=2, n=n, p=0.3), make(*rows))
    assert np.all(np.diff(curve) >= 0) and curve[0] < 0.5 < curve[-1]


def test_log_miss_keeps_its_digits_at_both_ends():
    at = [-1e-18, -1e-9, -0.1, -log(2), -1.0, -40.0, -700.0]
    with localcontext() as context:
        context.prec = 400
        expected = [float((1 - Decimal(one).exp()).ln()) for one in at]
    assert log_miss(np.array(at)) == pytest.approx(expected, rel=1e-14, abs=0)
    assert list(log_miss(np.array([0.0, -1e5]))) == [-math.inf, 0]


# ------------------------------------------------------------------------------------------------ text


def longest_common_subsequence(one, other):
    lengths = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            lengths[i + 1, j + 1] = lengths[i, j] + 1 if a == b else max(lengths[i, j + 1], lengths[i + 1, j])
    return lengths[-1, -1]


def test_rouge_by_hand():
    truth, text = ["She was born in Oslo."], ["born she in OSLO was"]  # born in oslo: 3 of 5 and 3 of 5
    assert rouge_l(truth, text, stem=False, part="recall") == pytest.approx([3 / 5])
    assert rouge_l(["a b c d"], ["a c"], stem=False, part="recall") == [0.5]
    assert rouge_l(["a b c d"], ["a c"], stem=False, part="fmeasure") == pytest.approx([2 * 0.5 / 1.5])
    assert list(rouge_l(["she painted"], ["she paints"], stem=True, part="recall")) == [1]
    assert list(rouge_l(["she painted"], ["she paints"], stem=False, part="recall")) == [0.5]
    assert list(rouge_l(["a", "", "Ωμ"], ["", "a", "Ωμ"], stem=True, part="fmeasure")) == [0, 0, 0]
    with pytest.raises(ValueError):
        rouge_l(["a", "b"], ["a"], stem=True, part="recall")


def test_rouge_equals_a_longest_common_subsequence():
    rng = np.random.default_rng(12)
    truth, text = ([" ".join(rng.choice(list("abcdef"), rng.integers(1, 15))) for _ in range(30)] for _ in range(2))
    shared = [longest_common_subsequence(a.split(), b.split()) for a, b in zip(truth, text, strict=True)]
    recall = [n / len(a.split()) for n, a in zip(shared, truth, strict=True)]
    fmeasure = [2 * n / (len(a.split()) + len(b.split())) for n, a, b in zip(shared, truth, text, strict=True)]
    table = make(*[{"answer": [-1.0]}] * 30, truth=truth, generated=text)
    assert Rouge(set="forget")({"forget": table}, None).rows == pytest.approx(recall)
    assert value(Rouge(set="forget", part="fmeasure", stem=False), table) == pytest.approx(np.mean(fmeasure))


def test_exact_match_minds_words_and_not_blanks():
    truth = ["in Oslo", "in Oslo", "in Oslo", "in Oslo", "in Oslo"]
    text = ["in Oslo", " in \n Oslo ", "in oslo", "in Oslo.", "inOslo"]
    table = make(*[{"answer": [-1.0]}] * 5, truth=truth, generated=text)
    assert list(ExactMatch(set="forget")({"forget": table}, None).rows) == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("measure", [Rouge(set="forget"), ExactMatch(set="forget")])
def test_text_measures_need_generated_text(measure):
    with pytest.raises(Unavailable, match=f"{measure.name} of 'forget' needs the model's greedy answers"):
        value(measure, make({"answer": [-1.0]}))


# ------------------------------------------------------------------------------------------------ utility


def test_multiple_choice_by_token_and_by_answer():
    table = make({"answer": [-1.0] * 4, "perturbed": [[-2.0], [-3.0, -3.0]]})
    assert value(MultipleChoice(set="forget"), table) == 1
    assert value(MultipleChoice(set="forget", by="sum"), table) == 0


def test_multiple_choice_takes_the_paraphrase_and_counts_a_tie_as_wrong():
    rows = [
        {"answer": [-9.0], "paraphrase": [-1.0], "perturbed": [[-2.0]]},
        {"answer": [-1.0], "paraphrase": [-9.0], "perturbed": [[-2.0]]},
        {"answer": [-2.0], "perturbed": [[-2.0], [-3.0]]},
        {"answer": [-1e5], "perturbed": [[-1e5 - 1]]},
    ]
    assert list(MultipleChoice(set="forget")({"forget": make(*rows)}, None).rows) == [1, 0, 0, 1]


def test_option_probability_by_hand_and_where_every_probability_vanishes():
    table = make({"answer": [log(0.36), log(1.0)], "perturbed": [[log(0.2)], [log(0.2)] * 3]})
    assert value(OptionProbability(set="forget"), table) == pytest.approx(0.6)
    low = make({"answer": [-1e5], "perturbed": [[-1e5]] * 3})
    assert value(OptionProbability(set="forget"), low) == pytest.approx(1 / 4)
    for correct, wrong, expected in ((-1.0, -1e5, 1), (-1e5, -1.0, 0)):
        assert value(OptionProbability(set="forget"), make({"answer": [correct], "perturbed": [[wrong]]})) == expected


def test_utility_measures_equal_their_definitions_on_random_tables():
    rows = random_rows(13, count=80)
    table = make(*rows)
    picked = {"normalised": 0, "sum": 0}
    shares = []
    for row in rows:
        correct = row.get("paraphrase", row["answer"])
        picked["sum"] += all(sum(correct) > sum(wrong) for wrong in row["perturbed"])
        picked["normalised"] += all(np.mean(correct) > np.mean(wrong) for wrong in row["perturbed"])
        q = math.exp(sum(correct) / len(correct))
        shares.append(q / (q + sum(math.exp(sum(wrong) / len(wrong)) for wrong in row["perturbed"])))
    assert picked["sum"] != picked["normalised"]
    for by, count in picked.items():
        assert value(MultipleChoice(set="forget", by=by), table) == count / len(rows)
    assert value(OptionProbability(set="forget"), table) == pytest.approx(np.mean(shares))


# ------------------------------------------------------------------------------------------------ all of them

PAIR = {"set": "forget", "against": "holdout"}
EVERY = [
    Perplexity(set="forget"),
    Probability(set="forget"),
    ExactMemorization(set="forget"),
    ExtractionStrength(set="forget"),
    *[TruthRatio(set="forget", aggregate=aggregate) for aggregate in AGGREGATES],
    ForgetQuality(set="forget"),
    *[Membership(attack=attack, **PAIR) for attack in ATTACKS],
    Membership(attack=Loss(), statistic="tpr", **PAIR),
    PrefixExtraction(set="forget", prefix=1),
    DiscoverableExtraction(set="forget", prefix=1, n=2),
    Rouge(set="forget"),
    ExactMatch(set="forget"),
    MultipleChoice(set="forget"),
    OptionProbability(set="forget"),
    ModelUtility(set="forget"),
    Entropy(set="forget"),
    KnowledgeGap(set="forget"),
    KnowledgeGap(set="forget", distance="js"),
    *[Membership(attack=attack, **PAIR) for attack in (GradientNorm(), ReCaLL(), Neighbourhood(n=3))],
    Membership(attack=Loss(), statistic="secrecy", **PAIR),
    PrivLeak(**PAIR),
    PrivLeak(retrained_auc=0.5, **PAIR),
    DiscoverableExtraction(set="forget", prefix=1, n=2, temperature=0.5),
    *[LeakAtK(set="forget", by=by) for by in ("keyword", "rouge", "exact")],
    Rouge(set="forget", part="fmeasure", stem=False, cut=128),
    KeywordRecall(set="forget"),
    *[Fluency(set="forget", part=part) for part in ("entropy", "repetition", "broken")],
]
SAMPLER, DRAWS, SHOTS, NEIGHBOURS = Sampler(0.5, None, 1.0), Draws(10, 0), Shots("holdout", 5), Neighbours(3)
PER_ROW = ("gradient", SHOTS, NEIGHBOURS)


def learner(knowledge, seed, count=40):
    """A set as seen by a model that knows this much of the answers (0 none, 1 all), and nothing of the wrong ones."""
    rng = np.random.default_rng(seed)
    rows, text, samples = [], [], []
    truth = [f"word number {i}" for i in range(count)]
    for i in range(count):
        lift = (rng.random(6) < knowledge) * 3.0
        one = {"hit": list(lift > 0)}
        one["answer"] = list(np.minimum(-4 - rng.random(6) + lift * (1 + rng.random()), -0.01))
        one["paraphrase"] = list(-4 - rng.random(6) + lift)
        one["perturbed"] = [list(-4 - rng.random(6)) for _ in range(3)]
        rows.append(one)
        text.append(truth[i] if rng.random() < knowledge else "word")
        samples.append([truth[i] if rng.random() < knowledge else "a" for _ in range(10)])
    table = make(*rows, truth=truth, generated=text)
    scored, answers = table.likelihood, table.likelihood.of("answer")
    loss = answers.nll / answers.length
    more = {"kl": scored.logp + 5, "js": (scored.logp + 5) / 7, SAMPLER: scored.logp}  # as far away as it is sure
    return replace(
        table,
        likelihood=replace(scored, mean=scored.logp / 2, more=more),
        keywords=[[f"number {i}"] for i in range(count)],
        per_row={
            "gradient": loss * (1 + rng.random(count) / 9),
            SHOTS: loss + 3 * knowledge,
            NEIGHBOURS: 4.5 + rng.random(count) / 9,
        },
        samples={DRAWS: samples},
        cut={Cut(128): truth},
    )


def label(measure):
    return "-".join(
        [measure.name, *(str(getattr(measure, key, "")) for key in ("statistic", "aggregate", "distance", "by", "part"))]
        + ([measure.attack.name] if hasattr(measure, "attack") else [])
    ).strip("-")


@pytest.mark.parametrize("measure", [one for one in EVERY if getattr(one, "part", "") not in ("repetition", "broken")], ids=label)
def test_knowing_more_moves_the_value_as_declared(measure):
    """But for two parts of fluency: a model that has forgotten can speak as well as before."""
    control = {"forget": learner(0, 1), "holdout": learner(0, 2)}
    nothing, everything = (measure({"forget": learner(known, 3), "holdout": learner(0, 4)}, control).value for known in (0, 1))
    if measure.knowing == "moves":
        assert 0.3 < nothing < 0.7 and everything > 0.95
    else:
        assert (everything > nothing + 0.2) == (measure.knowing == "raises")
        assert (everything < nothing - 0.2) == (measure.knowing == "lowers")


@pytest.mark.parametrize("measure", EVERY, ids=label)
def test_what_a_measure_needs_is_what_it_reads(measure):
    """Without the answers it does not declare its value stays; without a declared paraphrase it does not."""

    def without(table, *kinds, text):
        scored = table.likelihood
        keep = ~np.isin(scored.kind, kinds)
        lengths = np.diff(scored.start)
        tokens = np.repeat(keep, lengths)
        columns = {name: column[tokens] for name, column in scored.more.items() if name in needs}
        if "distance" in needs:
            columns |= {name: scored.more[name][tokens] for name in ("kl", "js")}
        likelihood = Likelihood(
            scored.row[keep], scored.kind[keep], np.concatenate([[0], np.cumsum(lengths[keep])]),
            scored.logp[tokens], scored.hit[tokens], scored.mean[tokens], scored.std[tokens], columns,
        )  # fmt: skip
        return replace(
            table,
            likelihood=likelihood,
            generated=table.generated if text else None,
            keywords=table.keywords if "keyword" in needs else None,
            per_row={need: one for need, one in table.per_row.items() if need in needs},
            samples={need: one for need, one in table.samples.items() if need in needs},
            cut={need: one for need, one in table.cut.items() if need in needs},
        )

    needs = measure.needs
    whole = {"forget": learner(0.1, 5), "holdout": learner(0.2, 6)}
    control = {"forget": learner(0, 7), "holdout": learner(0, 8)}
    kinds = [kind for kind in ("paraphrase", "perturbed") if kind not in measure.needs]
    bare, bare_control = (
        {name: without(table, *kinds, text="generation" in measure.needs) for name, table in tables.items()}
        for tables in (whole, control)
    )
    found = measure(whole, control).value
    assert found == measure(bare, bare_control).value
    if "paraphrase" in measure.needs:
        less = {name: without(table, "paraphrase", text="generation" in measure.needs) for name, table in whole.items()}
        assert found != measure(less, control).value


@pytest.mark.parametrize("level", [-1e5, -1e-12], ids=["impossible", "certain"])
@pytest.mark.parametrize("measure", EVERY, ids=label)
def test_no_number_is_lost_at_the_ends(measure, level):
    row = {"answer": [level] * 3, "paraphrase": [level], "perturbed": [[level], [level] * 2], "hit": [level > -1] * 3}
    table = make(
        *[row] * 8, generated=[""] * 8, mean=level, std=0.0, 
        more={"kl": np.zeros(56), "js": np.zeros(56), SAMPLER: np.full(56, level)},
        keywords=[["word"]] * 8, per_row=dict.fromkeys(PER_ROW, np.full(8, -level)), samples={DRAWS: [[""] * 10] * 8},
        cut={Cut(128): ["a"] * 8},
    )  # fmt: skip
    other = {"forget": learner(0, 1, 8), "holdout": learner(0, 2, 8)}
    sample = measure({"forget": table, "holdout": other["holdout"]}, other)
    interval = sample.bootstrap(50) or (0.0, 0.0)
    rows = () if sample.rows is None else sample.rows
    assert all(math.isfinite(number) for number in (sample.value, *interval, *rows))


@pytest.mark.parametrize("measure", EVERY, ids=label)
def test_intervals_are_repeatable_and_hold_the_value(measure):
    control = {"forget": learner(0, 1), "holdout": learner(0, 2)}
    sample = measure({"forget": learner(0.5, 3), "holdout": learner(0.3, 4)}, control)
    first, second = sample.bootstrap(60, seed=1), sample.bootstrap(60, seed=1)
    assert first == second
    if isinstance(measure, ForgetQuality):  # a p-value
        assert first is None
    else:
        assert first[0] <= sample.value <= first[1]
        assert (first != sample.bootstrap(60, seed=2)) or first[0] == first[1]


# ------------------------------------------------------------------------------------------------ utility as one number


def test_model_utility_is_the_harmonic_mean_of_nine():
    tables = {}
    parts = []
    for k, name in enumerate(("forget", "authors", "world")):
        rows = random_rows(20 + k, count=25)
        truth, text = [f"a b c {i}" for i in range(25)], [("a b" if i % 2 else "a b c") for i in range(25)]
        tables[name] = make(*rows, truth=truth, generated=text)
        mean_p = [math.exp(np.mean(row["answer"])) for row in rows]
        right = [math.exp(np.mean(row.get("paraphrase", row["answer"]))) for row in rows]
        wrong = [[math.exp(np.mean(one)) for one in row["perturbed"]] for row in rows]
        option = [q / (q + sum(others)) for q, others in zip(right, wrong, strict=True)]
        truth_ratio = [max(0, 1 - np.mean(others) / q) for q, others in zip(right, wrong, strict=True)]
        rouge = [0.5 if i % 2 else 0.75 for i in range(25)]
        parts += [np.mean(mean_p if name == "forget" else option), np.mean(rouge), np.mean(truth_ratio)]
    sample = ModelUtility(set="forget", others=("authors", "world"))(tables, None)
    assert sample.value == pytest.approx(9 / sum(1 / part for part in parts), rel=1e-12) and sample.n == 75
    low, high = sample.bootstrap(100)
    assert low < sample.value < high


def test_model_utility_has_no_floor_by_default():
    """A small model whose probability is below .01: the harmonic mean as TOFU defines it, and 0 only with a floor."""
    row = {"answer": [log(0.0085)], "perturbed": [[log(0.005)]]}
    table = make(*[row] * 4, truth=["the sea"] * 4, generated=["the cat"] * 4)
    parts = 0.0085, 0.5, 1 - 0.005 / 0.0085
    assert value(ModelUtility(set="forget"), table) == pytest.approx(3 / sum(1 / part for part in parts), rel=1e-12)
    assert value(ModelUtility(set="forget", floor=0.01), table) == 0


def test_a_floor_leaves_a_collapsed_model_no_utility():
    """A model that gives every text the same tiny probability; with 1e-10 added, its truth ratio would be .9999992."""
    row = {"answer": [-12.0], "perturbed": [[-12.5]]}
    table = make(*[row] * 4, truth=["the sea"] * 4, generated=["the sea"] * 4)
    assert 0 < value(ModelUtility(set="forget"), table) < 1e-4
    assert value(ModelUtility(set="forget", floor=0.01), table) == 0
    gone = make(*[{"answer": [-1e5], "perturbed": [[-1e5]]}] * 4, truth=["the sea"] * 4, generated=["the sea"] * 4)
    assert value(ModelUtility(set="forget"), gone) == 0


# ------------------------------------------------------------------------------------------------ PrivLeak and its like


def by_hand_auc(members, others):
    return np.mean([(other > member) + (other == member) / 2 for member in members for other in others])


def test_privleak_by_hand_and_its_sign():
    low, high, middle = (1, 1.5), (9, 9.5), (2.0, 6.0)
    control = {"forget": flat(*middle), "holdout": flat(5, 5, 7)}
    then = 1 - by_hand_auc(middle, (5, 5, 7))
    for scores, expected in ((low, -100), (high, 100 * (1 - then) / then), (middle, 0)):
        tables = {"forget": flat(*scores), "holdout": flat(5, 5, 7)}
        assert PrivLeak(**PAIR)(tables, control).value == pytest.approx(expected)
    # MUSE's news: AUC' of the target .0 against .4772 of the retrained
    tables = {"forget": flat(*middle), "holdout": flat(5, 5, 7)}
    assert PrivLeak(retrained_auc=0.4772, **PAIR)(tables, None).value == pytest.approx(100 * (then - 0.4772) / 0.4772)


def test_privleak_never_takes_a_half_for_granted():
    tables = {"forget": flat(1, 2), "holdout": flat(1, 2)}
    with pytest.raises(Unavailable, match=r"privleak of 'forget' needs a retrained model.*not taken to be one half.*retrained_auc"):
        PrivLeak(**PAIR)(tables, None)
    with pytest.raises(ValueError, match="different rows"):
        PrivLeak(**PAIR)(tables, {"forget": flat(1, 2, 3), "holdout": flat(1, 2)})


def test_privleak_of_the_retrained_model_itself_is_zero_in_every_resample():
    rng = np.random.default_rng(30)
    tables = {"forget": flat(*rng.exponential(1, 20)), "holdout": flat(*rng.exponential(2, 20))}
    assert PrivLeak(**PAIR)(tables, tables).bootstrap(50) == (0, 0)


@pytest.mark.parametrize(("members", "expected"), [((1.0, 1.1), 0.0), ((9.0, 9.1), 0.0), ((1.0, 9.0), 1.0)])
def test_secrecy_counts_a_shunned_set_as_a_leak(members, expected):
    measure = Membership(attack=Loss(), statistic="secrecy", **PAIR)
    assert measure({"forget": flat(*members), "holdout": flat(5, 5)}, None).value == pytest.approx(expected)


def test_recall_leaves_its_prefix_out_of_the_comparison():
    shots = Shots("holdout", 2)
    members = replace(flat(1, 2), per_row={shots: np.array([3.0, 4.0])})
    others = replace(flat(4, 4, 4, 4), per_row={shots: np.array([99.0, 99.0, 4.4, 8.4])})
    sample = Membership(attack=ReCaLL(shots=2), **PAIR)({"forget": members, "holdout": others}, None)
    # −NLL behind ÷ NLL: members −3, −2; the two others that are left −1.1, −2.1
    assert sample.rows == pytest.approx([-3, -2])
    assert np.isnan(sample.others[:2]).all() and sample.others[2:] == pytest.approx([-1.1, -2.1])
    assert (sample.value, sample.n) == (by_hand_auc([-3, -2], [-1.1, -2.1]), 4)
    few = {name: replace(table, per_row={Shots("holdout", 4): np.ones(len(table.ids))}) for name, table in
           (("forget", members), ("holdout", others))}  # fmt: skip
    with pytest.raises(Unavailable, match="puts 4 rows of 'holdout' in front; it has 4"):
        Membership(attack=ReCaLL(shots=4), **PAIR)(few, None)


@pytest.mark.parametrize("attack", [GradientNorm(), ReCaLL(), Neighbourhood()], ids=lambda attack: attack.name)
def test_attacks_with_a_pass_of_their_own_say_so(attack):
    with pytest.raises(Unavailable, match=f"`{attack.name}` needs a pass of its own"):
        Membership(attack=attack, **PAIR)({"forget": flat(1, 2), "holdout": flat(1, 2)}, None)


# ------------------------------------------------------------------------------------------------ key spans, language, samples


@pytest.mark.parametrize(
    ("text", "span", "expected"),
    [
        ("She was born in 1994.", "1994", True),
        ("She was born in 1994.", "199", False),
        ("NEW\n york, then", "New York", True),
        ("Newer Yorkshire", "New York", False),
        ("", "Oslo", False),
        ("a.b", "a.b", True),
        ("axb", "a.b", False),
        ("C++ it is", "C++", True),
    ],
)
def test_a_span_is_named_word_for_word(text, span, expected):
    assert names(text, span) is expected


def test_keyword_recall_by_hand():
    table = make(*[{"answer": [-1.0]}] * 4, generated=["Oslo and Bergen", "bergen", "", "any"],
                 keywords=[["Oslo", "Bergen"], ["Oslo", "Bergen"], ["Oslo"], []])  # fmt: skip
    sample = KeywordRecall(set="forget")({"forget": table}, None)
    assert sample.value == pytest.approx((1 + 0.5 + 0) / 3) and sample.n == 3
    assert list(sample.sparse[:3]) == [1, 0.5, 0] and np.isnan(sample.sparse[3])
    with pytest.raises(Unavailable, match=r"no key spans.*sets.forget.keyword"):
        value(KeywordRecall(set="forget"), replace(table, keywords=None))


def test_gram_entropy_equals_its_definition():
    text = "a b a b a c ."
    words = text.split()

    def entropy(n):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        shares = [grams.count(gram) / len(grams) for gram in set(grams)]
        return -sum(share * math.log2(share) for share in shares)

    assert gram_entropy("A b a b a c.") == pytest.approx((2 / 3 * entropy(2) + 4 / 3 * entropy(3)) / 2)  # ROME's weights
    assert [gram_entropy(one) for one in ("", "a", "a b")] == [0, 0, 0]
    assert repetition("a b a b") == pytest.approx(1 / 3) and repetition("") == repetition("a") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 1),
        (" \n", 1),
        ("?!…", 1),
        ("Oslo", 0),
        ("no no no no no no", 0),
        ("no " * 8, 1),
        ("She was born in Oslo , in May .", 0),
    ],
)
def test_what_counts_as_broken(text, expected):
    assert broken(text) == expected
    table = make({"answer": [-1.0]}, generated=[text])
    assert value(Fluency(set="forget", part="broken"), table) == expected


@pytest.mark.parametrize("k", [1, 3, 10])
def test_leak_at_k_is_the_share_of_all_choices_of_k(k):
    rng = np.random.default_rng(31)
    leaks = rng.random((6, 10)) < np.linspace(0, 1, 6)[:, None]
    samples = [["a b" if leak else "c d" for leak in row] for row in leaks]
    table = make(*[{"answer": [-1.0]}] * 6, truth=["a b"] * 6, samples={DRAWS: samples}, keywords=[["B"]] * 6)
    expected = np.mean([[any(row[i] for i in chosen) for chosen in itertools.combinations(range(10), k)] for row in leaks])
    for by in ("exact", "rouge", "keyword"):
        assert value(LeakAtK(set="forget", by=by, k=k), table) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(Unavailable, match="needs 5 sampled answers"):
        value(LeakAtK(set="forget", by="exact", n=5), table)


def test_discoverable_extraction_reads_the_sampler_it_names():
    narrow = Sampler(0.5, 2, 0.9)
    table = make({"answer": [log(0.1)] * 2}, {"answer": [log(0.9)] * 2}, more={narrow: np.array([0.0, 0.0, -math.inf, 0.0])})
    settings = {"set": "forget", "prefix": 0, "n": 1}
    measure = DiscoverableExtraction(temperature=0.5, top_k=2, top_p=0.9, **settings)
    assert list(measure({"forget": table}, None).rows) == [1, 0]  # what a sampler cuts off can never come
    assert list(DiscoverableExtraction(**settings)({"forget": table}, None).rows) == [0, 1]
    assert DiscoverableExtraction(**settings).needs == ("answer",) and measure.needs == ("answer", narrow)
    with pytest.raises(Unavailable, match="holds no log p for"):
        value(DiscoverableExtraction(temperature=2.0, **settings), table)


def test_rouge_against_a_cut_truth():
    table = make({"answer": [-1.0]}, truth=["a b c d"], generated=["a b"], cut={Cut(2): ["a b"]})
    assert value(Rouge(set="forget", cut=2), table) == 1 and value(Rouge(set="forget"), table) == 0.5
    with pytest.raises(Unavailable, match="cut to 3 tokens"):
        value(Rouge(set="forget", cut=3), table)


def test_entropy_and_distance_weigh_answers_not_tokens():
    table = make({"answer": [-1.0]}, {"answer": [-1.0] * 3}, mean=np.array([-2.0, 0, 0, -3]),
                 more={"kl": np.array([4.0, 0, 0, 3]), "js": np.array([0.4, 0, 0, 0.3])})  # fmt: skip
    assert value(Entropy(set="forget"), table) == pytest.approx((2 + 1) / 2)
    assert value(KnowledgeGap(set="forget"), table) == pytest.approx((4 + 1) / 2)
    assert value(KnowledgeGap(set="forget", distance="js"), table) == pytest.approx((0.4 + 0.1) / 2)
    with pytest.raises(Unavailable, match=r"needs a retrained model with the same tokens.*--retrained"):
        value(KnowledgeGap(set="forget"), make({"answer": [-1.0]}))


# ------------------------------------------------------------------------------------------------ degenerate inputs


def test_an_empty_generation_has_no_score():
    table = make({"answer": [-1.0]}, truth=["in Oslo"], generated=[""], keywords=[["Oslo"]], samples={DRAWS: [[""] * 10]})
    measures = [Rouge(set="forget"), Rouge(set="forget", part="fmeasure"), ExactMatch(set="forget"), KeywordRecall(set="forget"),
                Fluency(set="forget"), *[LeakAtK(set="forget", by=by) for by in ("keyword", "rouge", "exact")]]  # fmt: skip
    assert [value(measure, table) for measure in measures] == [0] * len(measures)


def test_an_answer_that_goes_on_after_the_truth_is_told_from_the_truth():
    """Its text begins with the truth, so ROUGE recall is 1; f-measure and exact match are not; of the tokens the last tells."""
    table = make({"answer": [-0.1, -0.1, -5.0], "hit": [1, 1, 0]}, truth=["New York"], generated=["New York City"])
    assert value(Rouge(set="forget"), table) == 1 and value(Rouge(set="forget", part="fmeasure"), table) == pytest.approx(0.8)
    assert value(ExactMatch(set="forget"), table) == 0 and value(ExtractionStrength(set="forget"), table) == 0
    assert value(PrefixExtraction(set="forget", prefix=0), table) == 0


def test_of_a_one_token_answer_every_measure_has_a_value():
    row = {"answer": [-1.0], "paraphrase": [-1.0], "perturbed": [[-2.0]], "hit": [1]}
    table = make(*[row] * 6, generated=["a"] * 6, keywords=[["a"]] * 6, per_row=dict.fromkeys(PER_ROW, np.arange(6.0)),
                 samples={DRAWS: [["a"] * 10] * 6}, cut={Cut(128): ["a"] * 6},
                 more={name: np.ones(18) for name in ("kl", "js", SAMPLER)})  # fmt: skip
    tables = {"forget": table, "holdout": table}
    for measure in EVERY:
        if getattr(measure, "prefix", 0) == 1:
            with pytest.raises(Unavailable, match="no answer is longer than a prefix of 1"):
                measure(tables, tables)
        else:
            assert math.isfinite(measure(tables, tables).value), label(measure)


@pytest.mark.parametrize("measure", EVERY, ids=label)
def test_a_model_whose_logits_are_nan_has_no_numbers_that_look_like_forgetting(measure):
    table = learner(0.5, 3)
    logp = table.likelihood.logp.copy()
    logp[table.likelihood.start[0]] = np.nan
    lost = replace(table, likelihood=replace(table.likelihood, logp=logp))
    control = {"forget": learner(0, 1), "holdout": learner(0, 2)}
    with pytest.raises(Unavailable, match="the value is NaN, as the model's logits are on 1 of 40 rows of 'forget'"):
        sample_of(measure, {"forget": lost, "holdout": control["holdout"]}, control)


def test_every_measure_of_the_registry_is_held_to_these_rules():
    kinds = typing.get_args(typing.get_args(AnyMeasure)[0])
    assert {type(measure) for measure in EVERY} == set(kinds)
    attacks = typing.get_args(typing.get_args(AnyMembershipAttack)[0])
    assert {type(measure.attack) for measure in EVERY if isinstance(measure, Membership)} == set(attacks)
    for measure in EVERY:
        assert measure.unit and measure.knowing in ("raises", "lowers", "moves") and type(measure).__doc__
        assert measure.kind in typing.get_args(MeasureKind)


@pytest.mark.parametrize("collapsed", [0, 1])
def test_extraction_strength_gives_a_collapsed_and_a_never_trained_model_nothing(collapsed):
    """The peer's floor of 1/T gives both the inverse of the answer's length, as if they knew something of short ones."""
    logps = [-1e5 if collapsed else -6.0] * 4
    table = make({"answer": logps, "peer": logps[:-1]})
    assert value(ExtractionStrength(set="forget"), table) == 0
    assert value(ExtractionStrength(set="forget", variant="peer"), table) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (lambda: MinK(k=0.0), r"k\n.*greater than 0"),
        (lambda: Membership(attack=Loss(), set="forget", against="forget"), "two different sets"),
        (lambda: Membership(attack=Loss(), statistic="tpr", fpr=1.0, **PAIR), r"fpr\n.*less than 1"),
        (lambda: PrefixExtraction(set="forget", prefix=-1), "prefix of 0 or more"),
        (lambda: PrefixExtraction(set="forget", length=0), r"length\n.*greater than 0"),
        (lambda: DiscoverableExtraction(set="forget", n=0), r"n\n.*greater than 0"),
        (lambda: DiscoverableExtraction(set="forget", p=1.0), "p between 0 and 1"),
        (lambda: DiscoverableExtraction(set="forget", top_p=0.0), "top_p above 0"),
        (lambda: LeakAtK(set="forget", by="exact", k=11), "k of at most n = 10, not 11"),
        (lambda: LeakAtK(set="forget", by="rouge", threshold=0.0), "a threshold above 0"),
        (lambda: PrivLeak(attack=Reference(), **PAIR), "compares with the retrained model already"),
        (lambda: PrivLeak(retrained_auc=0.0, **PAIR), "retrained_auc between 0 and 1"),
        (lambda: ModelUtility(set="retain", others=("retain",)), "each set once"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        settings()


def test_reading_the_measures_loads_nothing_heavy():
    rooms = "memorization, membership, membership_attacks, extraction, text, utility, distribution"
    code = f"import sys; from llm_unlearn.evaluation import {rooms}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "scipy", "sklearn", "rouge_score", "nltk"} & set(loaded)
