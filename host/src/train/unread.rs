//! Figures of steps that are still on the device.
//!
//! To read a number from a GPU is to wait for all that was queued before it, and a GPU that is waited for in every step
//! runs dry. So the numbers of a step stay where they are until a log line or a checkpoint wants them, and then come in
//! one copy.

use jepa_plugin_api::tch::{Device, Kind, TchError, Tensor};

/// One number of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Optimizer steps taken before.
    pub step: u64,
    /// The metric.
    pub name: String,
    /// NaN and ±inf as they are.
    pub value: f64,
}

/// Numbers in the order in which they were measured.
#[derive(Debug, Default)]
pub struct Unread {
    names: Vec<(u64, String)>,
    values: Vec<Tensor>,
}

impl Unread {
    /// Keeps `value`, a tensor of one number, as it is now, without waiting for it.
    ///
    /// # Errors
    /// Whatever libtorch reports, for a tensor of more than one number too.
    pub fn push(&mut self, step: u64, name: String, value: &Tensor) -> Result<(), TchError> {
        // A copy: a method may go on with its tensor, or hand out one number of a large one.
        let value = value.detach().f_reshape([0i64; 0])?.f_to_dtype(Kind::Double, true, true)?;
        self.names.push((step, name));
        self.values.push(value);
        Ok(())
    }

    /// Puts `later` behind these.
    pub fn append(&mut self, mut later: Unread) {
        self.names.append(&mut later.names);
        self.values.append(&mut later.values);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Their names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(|(_, name)| name.as_str())
    }

    /// All of them, f64 `(n)`, on the device where one is that is not on the CPU.
    ///
    /// # Errors
    /// Whatever libtorch reports, for none at all too.
    pub fn values(&self) -> Result<Tensor, TchError> {
        let device = self.values.iter().map(Tensor::device).find(|device| *device != Device::Cpu);
        let device = device.unwrap_or(Device::Cpu);
        // One that is on the CPU goes to the others without a wait for them.
        let values = self.values.iter().map(|value| value.f_to_device_(device, Kind::Double, true, false));
        Tensor::f_stack(&values.collect::<Result<Vec<_>, _>>()?, 0)
    }

    /// Gives them other values, f64 `(n)`.
    pub fn replace_values(&mut self, values: &Tensor) {
        for (number, value) in (0..).zip(&mut self.values) {
            *value = values.get(number);
        }
    }

    /// Waits for all of them and takes them out.
    ///
    /// # Errors
    /// Whatever libtorch reports; nothing is taken out then.
    pub fn read(&mut self) -> Result<Vec<Figure>, TchError> {
        if self.values.is_empty() {
            return Ok(Vec::new());
        }
        let values = Vec::<f64>::try_from(self.values()?.f_to_device(Device::Cpu)?)?;
        self.values.clear();
        let figure = |((step, name), value)| Figure { step, name, value };
        Ok(self.names.drain(..).zip(values).map(figure).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_several_steps_come_in_their_order_and_in_full() {
        let mut unread = Unread::default();
        assert_eq!(unread.read().unwrap(), []);
        unread.push(3, "train/loss".to_owned(), &Tensor::from(1.0f32 / 3.0)).unwrap();
        unread.push(3, "train/top1".to_owned(), &Tensor::from(7i64).view([1])).unwrap();
        let mut later = Unread::default();
        later.push(4, "train/loss".to_owned(), &Tensor::from(f64::INFINITY)).unwrap();
        unread.append(later);
        assert_eq!(unread.len(), 3);
        let figure = |step, name: &str, value| Figure { step, name: name.to_owned(), value };
        let expected = [
            figure(3, "train/loss", f64::from(1.0f32 / 3.0)),
            figure(3, "train/top1", 7.0),
            figure(4, "train/loss", f64::INFINITY),
        ];
        assert_eq!(unread.read().unwrap(), expected);
        assert_eq!(unread.len(), 0);
    }

    #[test]
    fn a_metric_of_several_numbers_is_an_error() {
        let mut unread = Unread::default();
        assert!(unread.push(0, "train/loss".to_owned(), &Tensor::from_slice(&[1.0f32, 2.0])).is_err());
        assert_eq!(unread.read().unwrap(), []);
    }

    #[test]
    fn what_becomes_of_the_tensor_later_does_not_matter() {
        let mut unread = Unread::default();
        for kind in [Kind::Double, Kind::Float] {
            let mut value = Tensor::from_slice(&[1.0, 2.0]).to_kind(kind);
            unread.push(0, "of a view".to_owned(), &value.get(1)).unwrap();
            let _ = value.fill_(9.0);
        }
        assert_eq!(unread.read().unwrap().iter().map(|figure| figure.value).collect::<Vec<_>>(), [2.0, 2.0]);
    }
}
