//! The nearest-neighbour vote: no training, so it judges the features alone.

use tch::{Kind, Tensor};

use super::error::{EvalError, GoOn};
use super::features::Features;
use super::topk::Hits;

/// Similarities held at once: 128 MiB of f32, whatever the size of the bank.
const SIMILARITIES: i64 = 32 << 20;
/// Queries at once, where the bank is small.
const MOST_QUERIES: i64 = 1024;
/// The least norm that a feature is divided by.
const LEAST_NORM: f64 = 1e-12;

/// Accuracies on the queries, in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KnnResult {
    /// The class with most votes is right.
    pub top1: f64,
    /// The right class is among the five with most votes.
    pub top5: f64,
}

/// The `k` features of the bank with the highest cosine similarity s vote for their class, each with weight
/// exp(s / temperature). `k` is cut to the size of the bank. Computes on the device of `bank`.
///
/// # Errors
/// Labels that are no class, sets of different encoders; what `go_on` says, asked for every block of queries.
pub fn evaluate(
    bank: &Features,
    queries: &Features,
    classes: i64,
    k: usize,
    temperature: f64,
    go_on: GoOn<'_>,
) -> Result<KnnResult, EvalError> {
    if k == 0 || temperature.is_nan() || temperature <= 0.0 {
        return Err(EvalError::Option(
            "the nearest-neighbour vote needs k of at least 1 and a positive temperature",
        ));
    }
    Features::check_pair(bank, queries, classes)?;
    let _no_grad = tch::no_grad_guard();
    let vote = Vote::new(bank, classes, k, temperature)?;
    let block = queries_at_once(bank.images());
    let mut hits = Hits::default();
    for (x, y) in queries.x.f_split(block, 0)?.iter().zip(&queries.y.f_split(block, 0)?) {
        go_on().map_err(EvalError::Stopped)?;
        hits.add(&vote.scores(&x.f_to_device(bank.x.device())?)?, &y.f_to_device(bank.x.device())?)?;
    }
    let (top1, top5) = hits.shares();
    Ok(KnnResult { top1, top5 })
}

/// How many queries meet a bank of so many features at once: memory does not grow with the bank.
fn queries_at_once(bank: i64) -> i64 {
    (SIMILARITIES / bank).clamp(1, MOST_QUERIES)
}

struct Vote<'a> {
    bank: &'a Features,
    /// (1, N)
    norms: Tensor,
    classes: i64,
    k: i64,
    temperature: f64,
}

impl<'a> Vote<'a> {
    fn new(bank: &'a Features, classes: i64, k: usize, temperature: f64) -> Result<Self, EvalError> {
        let norms = norms(&bank.x)?.f_view([1, -1])?;
        let k = i64::try_from(k).unwrap_or(i64::MAX).min(bank.images());
        Ok(Vote { bank, norms, classes, k, temperature })
    }

    /// The votes (B, C) on queries (B, D), where the vote of a query's nearest neighbour counts 1.
    fn scores(&self, x: &Tensor) -> Result<Tensor, EvalError> {
        let mut similarity = x.f_div(&norms(x)?)?.f_mm(&self.bank.x.f_transpose(0, 1)?)?;
        let _ = similarity.f_div_(&self.norms)?;
        let (nearest, places) = similarity.f_topk(self.k, 1, true, true)?;
        // Relative to the nearest one, so that no temperature overflows.
        let weights = nearest.f_sub(&nearest.f_narrow(1, 0, 1)?)?.f_div_scalar(self.temperature)?.f_exp()?;
        let voters = self.bank.y.f_index_select(0, &places.f_view([-1])?)?.f_view_as(&places)?;
        let mut votes = Tensor::f_zeros([x.size()[0], self.classes], (Kind::Float, x.device()))?;
        // One neighbour after the other, so that no two votes of a call meet and their order is the same on every device.
        for j in 0..self.k {
            let (voter, weight) = (voters.f_narrow(1, j, 1)?, weights.f_narrow(1, j, 1)?);
            let _ = votes.f_scatter_add_(1, &voter, &weight)?;
        }
        Ok(votes)
    }
}

/// (N, 1)
fn norms(x: &Tensor) -> Result<Tensor, EvalError> {
    Ok(x.f_norm_scalaropt_dim(2.0, [1i64].as_slice(), true)?.f_clamp_min(LEAST_NORM)?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::checkpoint::read_tensors;

    #[test]
    fn a_block_of_similarities_has_the_same_bound_for_every_bank() {
        for bank in [1, 60_000, 126_689, 1_281_167, SIMILARITIES] {
            let queries = queries_at_once(bank);
            assert!(queries >= 1 && queries * bank <= SIMILARITIES, "{queries} queries and {bank} features");
        }
        assert_eq!((queries_at_once(1), queries_at_once(60_000)), (1024, 559));
    }

    #[test]
    fn votes_equal_the_definition_and_lightly() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/knn.safetensors");
        let fixture: BTreeMap<String, Tensor> = read_tensors(&path).unwrap().into_iter().collect();
        let bank = Features::new(&fixture["input.bank"], &fixture["input.bank_labels"]).unwrap();
        let queries = Features::new(&fixture["input.queries"], &fixture["input.query_labels"]).unwrap();

        let share = |scores: &Tensor| scores / scores.sum_dim_intlist(1, true, Kind::Float);
        let scores = Vote::new(&bank, 4, 10, 0.1).unwrap().scores(&queries.x).unwrap();
        assert!(share(&scores).allclose(&share(&fixture["output.scores"]), 1e-5, 1e-7, false));
        let (_, order) = scores.sort_stable(true, 1, true);
        assert_eq!(order, fixture["output.order"]);

        let right =
            order.eq_tensor(&queries.y.unsqueeze(1)).narrow(1, 0, 1).mean(Kind::Double).double_value(&[]);
        let result = evaluate(&bank, &queries, 4, 10, 0.1, &|| Ok(())).unwrap();
        assert_eq!(result, KnnResult { top1: right, top5: 1.0 });
        assert_eq!(result.top1, 0.45);
    }
}
