//! How the numbers of a tensor are distributed.

use jepa_plugin_api::tch::{Kind, TchError, Tensor};
use serde::{Deserialize, Serialize};

/// In so many bins numbers are counted.
const BINS: i64 = 64;

/// Numbers, counted in bins of equal width from `min` to `max`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// The lower edge of the first bin.
    pub min: f64,
    /// The upper edge of the last bin.
    pub max: f64,
    /// The sum of all numbers.
    pub sum: f64,
    /// The sum of their squares.
    pub sum_of_squares: f64,
    /// How many numbers each bin has.
    pub counts: Vec<u64>,
}

impl Histogram {
    /// The numbers in `tensor`, of any shape and any float dtype.
    ///
    /// # Errors
    /// An empty tensor, numbers that are not finite, and whatever else libtorch reports.
    pub fn of(tensor: &Tensor) -> Result<Self, TchError> {
        let values = tensor.detach().f_to_kind(Kind::Double)?.f_reshape([-1])?;
        let (min, max) = (values.f_min()?.f_double_value(&[])?, values.f_max()?.f_double_value(&[])?);
        let counts = values.f_histc(BINS)?;
        // libtorch makes room around numbers that are all the same.
        let (min, max) = if min == max { (min - 1.0, max + 1.0) } else { (min, max) };
        let counts: Vec<f64> = Vec::try_from(&counts)?;
        Ok(Histogram {
            min,
            max,
            sum: values.f_sum(Kind::Double)?.f_double_value(&[])?,
            sum_of_squares: values.f_square()?.f_sum(Kind::Double)?.f_double_value(&[])?,
            counts: counts.into_iter().map(|count| count as u64).collect(),
        })
    }

    /// The edges of the bins, one more than there are bins.
    pub fn edges(&self) -> Vec<f64> {
        let bins = self.counts.len() as f64;
        (0..=self.counts.len()).map(|i| self.min + (self.max - self.min) * i as f64 / bins).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_in_its_bin() {
        let numbers: Vec<f32> = (0..=640).map(|i| i as f32 / 10.0 - 32.0).collect();
        let histogram = Histogram::of(&Tensor::from_slice(&numbers).reshape([1, 641])).unwrap();
        assert_eq!((histogram.min, histogram.max), (-32.0, 32.0));
        assert!(histogram.counts.iter().all(|count| (9..=11).contains(count)), "{:?}", histogram.counts);
        assert_eq!(histogram.counts.iter().sum::<u64>(), 641);
        assert!(histogram.sum.abs() < 1e-3, "{}", histogram.sum);
        let edges = histogram.edges();
        assert_eq!((edges.len(), edges[0], edges[32], edges[64]), (65, -32.0, 0.0, 32.0));

        let same = Histogram::of(&Tensor::from_slice(&[3.0f32; 5])).unwrap();
        assert_eq!((same.min, same.max, same.counts[32]), (2.0, 4.0, 5));
        assert!(Histogram::of(&Tensor::from_slice(&[1.0, f32::NAN])).is_err());
        assert!(Histogram::of(&Tensor::from_slice::<f32>(&[])).is_err());
    }
}
