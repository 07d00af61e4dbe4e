//! Batches of augmented views, made by worker threads ahead of the consumer.
//!
//! Every random number is keyed by seed, epoch, sample and view, and none by thread or time. So the batches of an
//! epoch are the same for any number of threads, and [`Loader::batches`] can start at any of them.
//!
//! One work item is one sample: a worker reads it, draws its views, decodes as much as they see of it, once, and writes
//! them into their places in the batch's tensors. The consumer's thread allocates the next batch and hands out its items
//! whenever it takes one, so at most [`prefetch`](LoaderOptions::prefetch) batches exist besides the one in use. Their memory serves
//! later batches, and each loader keeps it until it is dropped. In bytes that is
//!
//! ```text
//! (prefetch + 1) × batch_size × views × 3 × size² × 4   +   threads × (encoded + 6 × pixels of the largest image)
//! ```
//!
//! 309 MB for 3 × 128 single views of 224 px, and nothing else grows with time. (A decoder holds a JPEG's planes beside its
//! pixels; a PNG has up to 8 bytes for each pixel, and a progressive JPEG takes 12. With [`Augment::Gpu`], the 4 is a 1;
//! where a GPU crops as well, up to 4 views count as 4, and up to 9 as 9. Pinned batches are rounded up to a power of two, which makes 309 MB 537.)

use std::collections::{HashSet, VecDeque};
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender};
use jepa_plugin_api::{Rng, ViewSpec};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::augment::{Augmenter, Operation, Plan, Scratch, check_views};
use super::batch::{BatchMemory, Pool};
use super::clock::{Clock, Work};
use super::cut::{self, Cut};
use super::dataset::Dataset;
use super::decode::{Encoded, Region, Rgb, panic_message};
use super::error::DataError;
use super::finish::finish;
use super::order::Order;
use super::resample::CropBox;
use crate::device::{DeviceError, to_device};
use crate::trace::Trace;

/// What the numbers of a keyed generator are for. A view's purpose is `VIEW` plus its position.
mod purpose {
    pub const ORDER: u64 = 0x6461_7461_0001_0000;
    pub const REPLACEMENT: u64 = 0x6461_7461_0002_0000;
    pub const VIEW: u64 = 0x6461_7461_0003_0000;
}

/// How many others are tried in place of a corrupt image.
const REPLACEMENT_TRIES: u32 = 16;

/// What to do about an image that cannot be decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// Stop, naming the image.
    #[default]
    Fail,
    /// Use another image instead, drawn by keyed randomness; count it and name it.
    Replace,
}

/// How exactly images are decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decode {
    /// A JPEG of which every view sees at least 2 or 4 times its own side is made that much smaller as it is decoded: faster,
    /// and of photos 0.3 to 1.4 levels of 255 beside the exact pixels in the mean, at sharp edges up to some 30.
    #[default]
    Fast,
    /// The pixels of torchvision on Pillow.
    Exact,
}

/// Where views are made of decoded images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Augment {
    /// In the loader's threads.
    #[default]
    Cpu,
    /// On the run's device, a batch at once: the loader's threads only decode, or crop and resize as well, see
    /// [`crop_on_device`](LoaderOptions::crop_on_device). The views are the same.
    Gpu,
}

/// What of the batches of a data set, which are the same for any number of processes, one process makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Share {
    /// All of all.
    #[default]
    Whole,
    /// Of each batch the `part`-th of so many equal parts, from 0.
    OfEachBatch {
        /// Below `parts`.
        part: usize,
        /// How many processes share a batch.
        parts: usize,
    },
    /// Whole batches: those numbered `part`, `part + parts` and so on.
    OfBatches {
        /// Below `parts`.
        part: usize,
        /// How many processes share the batches.
        parts: usize,
    },
}

/// What a [`Loader`] makes, and how.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// The views of each image.
    pub views: Vec<ViewSpec>,
    /// Side of every view, in pixels.
    pub size: u32,
    /// Images in a batch, of all processes together.
    pub batch_size: usize,
    /// What of it this process makes.
    pub share: Share,
    /// The run's seed.
    pub seed: u64,
    /// Worker threads; 0 for one per core.
    pub threads: usize,
    /// Whether each epoch has an order of its own; otherwise the file's order is kept.
    pub shuffle: bool,
    /// Whether a last batch that is not full is left out.
    pub drop_last: bool,
    /// What happens when an image does not decode.
    pub on_error: OnError,
    /// How exactly images are decoded.
    pub decode: Decode,
    /// Where views are made of decoded images.
    pub augment: Augment,
    /// Whether views with [`Augment::Gpu`] are cropped and resized on the device as well, which [has to be able](super::cuts_on)
    /// to do that fast: a CPU is not. Batches of more than 65,535 images never are.
    pub crop_on_device: bool,
    /// Batches that may be in the making or ready, besides the one that the consumer holds.
    pub prefetch: usize,
    /// Whether batches are made in memory that a GPU reads by itself, which needs one.
    pub pinned: bool,
    /// Where the threads write what they do when.
    pub trace: Option<Trace>,
}

impl LoaderOptions {
    /// Shuffled training batches of 128, complete ones only, on every core, two batches ahead.
    pub fn new(views: Vec<ViewSpec>, size: u32) -> LoaderOptions {
        LoaderOptions {
            views,
            size,
            batch_size: 128,
            share: Share::Whole,
            seed: 0,
            threads: 0,
            shuffle: true,
            drop_last: true,
            on_error: OnError::Fail,
            decode: Decode::Fast,
            augment: Augment::Cpu,
            crop_on_device: false,
            prefetch: 2,
            pinned: false,
            trace: None,
        }
    }
}

/// One batch of B images.
#[derive(Debug)]
pub struct LoadedBatch {
    /// One f32 `(B, 3, S, S)` per view, in the order of the options.
    pub views: Vec<Tensor>,
    /// i64 `(B,)`; −1 where the data set has no label.
    pub labels: Tensor,
    /// Which images of the data set these are; a replaced one has its replacement's index.
    pub indices: Vec<u64>,
    /// How many of them replace a corrupt image.
    pub replaced: u64,
}

/// What is left to do to the views of an image.
#[derive(Clone, Debug, Default)]
struct Left {
    /// How each is cut out of the image's slot, where the device crops.
    cuts: Vec<Cut>,
    /// What is done to each then.
    operations: Vec<Vec<Operation>>,
}

/// A batch as the loader's threads have made it; [`finish`](Self::finish) does the rest.
#[derive(Debug)]
pub struct RawBatch {
    /// The same, but that views are u8 where something is left to do, and one tensor of slots where they are still to be cut.
    batch: LoadedBatch,
    /// What is left to do to the views of each image, of [`Augment::Gpu`].
    left: Option<Arc<Vec<Left>>>,
    shared: Arc<Shared>,
}

impl RawBatch {
    /// The batch on `device`, with everything done to its views.
    ///
    /// # Errors
    /// Whatever libtorch reports.
    pub fn finish(self, device: Device) -> Result<LoadedBatch, DeviceError> {
        let RawBatch { batch, left, shared } = self;
        let all: Vec<&Tensor> = batch.views.iter().chain([&batch.labels]).collect();
        let mut made = to_device(&all, device)?;
        let labels = made.pop().expect("labels are the last of them");
        let views = match left {
            None => made,
            Some(left) => {
                let views = shared.views.iter().enumerate().map(|(number, augmenter)| {
                    let operations: Vec<&[Operation]> =
                        left.iter().map(|left| &*left.operations[number]).collect();
                    tch::no_grad(|| {
                        let pixels = match shared.crop_on_device {
                            true => {
                                let cuts: Vec<&Cut> = left.iter().map(|left| &left.cuts[number]).collect();
                                cut::cut(&made[0], &cuts, shared.size)?
                            }
                            false => made[number].shallow_clone(),
                        };
                        finish(&pixels, &operations, augmenter.normalization())
                            .map_err(|error| DeviceError::Torch(error.to_string()))
                    })
                });
                views.collect::<Result<_, _>>()?
            }
        };
        Ok(LoadedBatch { views, labels, ..batch })
    }

    /// Number of images.
    #[expect(clippy::len_without_is_empty, reason = "a batch has images")]
    pub fn len(&self) -> usize {
        self.batch.indices.len()
    }

    /// The same tensors once more.
    pub fn shallow_clone(&self) -> RawBatch {
        let LoadedBatch { views, labels, indices, replaced } = &self.batch;
        let batch = LoadedBatch {
            views: views.iter().map(Tensor::shallow_clone).collect(),
            labels: labels.shallow_clone(),
            indices: indices.clone(),
            replaced: *replaced,
        };
        RawBatch { batch, left: self.left.clone(), shared: self.shared.clone() }
    }
}

/// Makes batches from a data set.
#[derive(Clone, Debug)]
pub struct Loader {
    shared: Arc<Shared>,
    batch_size: usize,
    share: Share,
    threads: usize,
    prefetch: usize,
    shuffle: bool,
    drop_last: bool,
}

/// What every worker needs to make any sample.
#[derive(Debug)]
struct Shared {
    dataset: Arc<Dataset>,
    views: Vec<Augmenter>,
    size: u32,
    seed: u64,
    on_error: OnError,
    decode: Decode,
    augment: Augment,
    /// Only of [`Augment::Gpu`].
    crop_on_device: bool,
    pool: Pool,
    clock: Arc<Clock>,
    /// Corrupt images that have been warned of.
    warned: Mutex<HashSet<u64>>,
}

impl Loader {
    /// Checks the options.
    ///
    /// # Errors
    /// When a view makes no sense, or the batch size is 0 or, with `drop_last`, greater than the data set, or has no equal
    /// [`Share`] for each rank.
    pub fn new(dataset: Arc<Dataset>, options: LoaderOptions) -> Result<Loader, DataError> {
        let views = check_views(&options.views, options.size)?;
        let LoaderOptions {
            size,
            batch_size,
            share,
            seed,
            threads,
            shuffle,
            drop_last,
            on_error,
            decode,
            augment,
            crop_on_device,
            prefetch,
            pinned,
            ..
        } = options;
        if let Share::OfEachBatch { parts, .. } = share
            && batch_size % parts != 0
        {
            return Err(DataError::Options(format!(
                "a batch of {batch_size} images has no {parts} equal parts, one for each rank: set optimizer.batch_size, \
                 which counts those of all ranks, to a multiple of {parts}"
            )));
        }
        let clock = Arc::new(Clock::new(options.trace));
        if batch_size == 0 {
            return Err(DataError::Options("the batch size is 0; a batch needs at least one image".into()));
        }
        if drop_last && batch_size > dataset.len() {
            return Err(DataError::Options(format!(
                "{} has {} images, fewer than one batch of {batch_size}; lower optimizer.batch_size",
                dataset.path().display(),
                dataset.len()
            )));
        }
        let threads =
            if threads == 0 { thread::available_parallelism().map_or(1, |n| n.get()) } else { threads };
        let warned = Mutex::default();
        let prefetch = prefetch.max(1);
        let crop_on_device = crop_on_device && augment == Augment::Gpu && batch_size <= cut::MOST_IMAGES;
        let tensors = if crop_on_device { 1 } else { views.len() };
        let pool = Pool::new(pinned, (prefetch + 1) * tensors);
        let shared = Arc::new(Shared {
            dataset,
            views,
            size,
            seed,
            on_error,
            decode,
            augment,
            crop_on_device,
            pool,
            clock,
            warned,
        });
        Ok(Loader { shared, batch_size, share, threads, prefetch, shuffle, drop_last })
    }

    /// The data set.
    pub fn dataset(&self) -> &Arc<Dataset> {
        &self.shared.dataset
    }

    /// Worker threads.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Batches that may be in the making or ready, besides the one that the consumer holds.
    pub fn prefetch(&self) -> usize {
        self.prefetch
    }

    /// The same batches by another number of threads, at least 1.
    pub fn with_threads(self, threads: usize) -> Loader {
        Loader { threads: threads.max(1), ..self }
    }

    /// What its threads have done so far.
    pub fn clock(&self) -> &Arc<Clock> {
        &self.shared.clock
    }

    /// Number of batches in an epoch, at least 1.
    pub fn batches_per_epoch(&self) -> usize {
        let images = self.shared.dataset.len();
        if self.drop_last { images / self.batch_size } else { images.div_ceil(self.batch_size) }
    }

    /// The order of the images in an epoch, before it is cut into batches.
    pub fn order(&self, epoch: u64) -> Order {
        let images = self.shared.dataset.len();
        match self.shuffle {
            true => Order::shuffled(images, &mut Rng::keyed(self.shared.seed, epoch, 0, purpose::ORDER)),
            false => Order::of_file(images),
        }
    }

    /// Starts the worker threads of an epoch and returns its batches from number `start` on, in order; of those that this
    /// process has a share in, that share.
    ///
    /// Work begins at the call, not at the first `next`. Dropping the iterator stops the threads within one image's
    /// time.
    pub fn batches(&self, epoch: u64, start: usize) -> Batches {
        let (work, items) = crossbeam_channel::unbounded();
        let stop = Arc::new(AtomicBool::new(false));
        let workers = (0..self.threads)
            .map_while(|number| {
                let worker = Worker {
                    shared: self.shared.clone(),
                    epoch,
                    items: items.clone(),
                    stop: stop.clone(),
                    encoded: Vec::new(),
                    image: Rgb::default(),
                    scratch: Scratch::default(),
                };
                let started =
                    thread::Builder::new().name(format!("data-{number}")).spawn(move || worker.run());
                started
                    .inspect_err(|error| tracing::warn!("loader thread {number} does not start: {error}"))
                    .ok()
            })
            .collect();
        let mut batches = Batches {
            order: self.order(epoch),
            batch_size: self.batch_size,
            share: self.share,
            next: match self.share {
                Share::OfBatches { part, parts } => start.next_multiple_of(parts) + part,
                _ => start,
            },
            end: self.batches_per_epoch(),
            prefetch: self.prefetch,
            in_flight: VecDeque::new(),
            failed: false,
            shared: self.shared.clone(),
            work: Some(work),
            stop,
            workers,
        };
        batches.top_up();
        batches
    }

    /// The batches of an epoch with their numbers, in rounds: in each, every process of [`Share::OfBatches`] has one, but for
    /// the last round, where some may have none.
    pub fn rounds(
        &self,
        epoch: u64,
    ) -> impl Iterator<Item = Option<(usize, Result<RawBatch, DataError>)>> + use<> {
        let (part, parts) = match self.share {
            Share::OfBatches { part, parts } => (part, parts),
            _ => (0, 1),
        };
        let mut batches = self.batches(epoch, 0);
        let rounds = 0..self.batches_per_epoch().div_ceil(parts);
        rounds.map(move |round| batches.next().map(|batch| (round * parts + part, batch)))
    }
}

/// The batches of one epoch, in order. Ends after the first error.
#[derive(Debug)]
pub struct Batches {
    order: Order,
    batch_size: usize,
    share: Share,
    /// Number of the first batch that is not yet handed out as work.
    next: usize,
    end: usize,
    prefetch: usize,
    in_flight: VecDeque<Result<Arc<Pending>, DataError>>,
    failed: bool,
    shared: Arc<Shared>,
    /// `None` once there is nothing more to hand out.
    work: Option<Sender<Item>>,
    stop: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
}

/// One sample to make: place `position` of `batch` gets image `index`.
#[derive(Debug)]
struct Item {
    batch: Arc<Pending>,
    position: usize,
    index: u64,
}

/// A batch in the making.
#[derive(Debug)]
struct Pending {
    memory: Memory,
    state: Mutex<PendingState>,
    done: Condvar,
}

#[derive(Debug)]
enum Memory {
    Views(BatchMemory<f32>),
    /// Views that are still to be finished.
    Pixels(BatchMemory<u8>),
    /// A slot for each image, of which they are still to be cut.
    Slots(BatchMemory<u8>),
}

#[derive(Debug)]
struct PendingState {
    remaining: usize,
    left: Vec<Left>,
    indices: Vec<u64>,
    labels: Vec<i64>,
    replaced: u64,
    /// The failure of the first sample in the batch that failed, so that which one is reported does not depend on
    /// threads.
    failure: Option<(usize, DataError)>,
}

impl Batches {
    /// How many batches are ready to be taken without waiting.
    pub fn ready(&self) -> usize {
        let is_ready = |batch: &&Result<Arc<Pending>, DataError>| match batch {
            Ok(pending) => pending.lock().remaining == 0,
            Err(_) => true,
        };
        self.in_flight.iter().take_while(is_ready).count()
    }

    /// Hands out work until as many batches are in flight as may be.
    fn top_up(&mut self) {
        while self.in_flight.len() < self.prefetch && self.next < self.end {
            let pending = self.hand_out(self.next);
            self.in_flight.push_back(pending);
            self.next += match self.share {
                Share::OfBatches { parts, .. } => parts,
                _ => 1,
            };
        }
        if self.next >= self.end {
            // The channel ends after what is in it, and so do the workers.
            self.work = None;
        }
    }

    fn hand_out(&self, batch: usize) -> Result<Arc<Pending>, DataError> {
        let first = batch * self.batch_size;
        let end = self.order.len().min(first + self.batch_size);
        let places = match self.share {
            Share::OfEachBatch { part, parts } => {
                let place = |part: usize| first + (end - first) * part / parts;
                place(part)..place(part + 1)
            }
            _ => first..end,
        };
        let indices: Vec<u64> = places.map(|place| self.order.at(place)).collect();
        indices.iter().for_each(|index| self.shared.dataset.will_need(*index as usize));
        if self.workers.is_empty() {
            return Err(DataError::Options("no loader thread could be started; lower data.threads".into()));
        }
        let Shared { views, size, augment, crop_on_device, pool, .. } = &*self.shared;
        let (views, images) = (views.len(), indices.len());
        let memory = match (augment, crop_on_device) {
            (Augment::Cpu, _) => BatchMemory::new(pool, views, images, *size).map(Memory::Views),
            (Augment::Gpu, false) => BatchMemory::new(pool, views, images, *size).map(Memory::Pixels),
            (Augment::Gpu, true) => {
                BatchMemory::new(pool, 1, images, cut::slot_side(*size, views)).map(Memory::Slots)
            }
        };
        let memory = memory.map_err(|error| {
            DataError::Options(format!("a batch of {images} images cannot be allocated: {error}"))
        })?;
        let state = PendingState {
            remaining: indices.len(),
            left: vec![Left::default(); indices.len()],
            labels: vec![-1; indices.len()],
            indices: indices.clone(),
            replaced: 0,
            failure: None,
        };
        let pending = Arc::new(Pending { memory, state: Mutex::new(state), done: Condvar::new() });
        for (position, index) in indices.into_iter().enumerate() {
            let item = Item { batch: pending.clone(), position, index };
            if let Some(work) = &self.work {
                // Workers only leave when told to, so someone listens.
                let _ = work.send(item);
            }
        }
        Ok(pending)
    }
}

impl Iterator for Batches {
    type Item = Result<RawBatch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        self.top_up();
        let batch = self.in_flight.pop_front()?.and_then(|pending| Pending::wait(pending, &self.shared));
        self.failed = batch.is_err();
        // Before the consumer goes off with this batch, its place is given to the next.
        if !self.failed {
            self.top_up();
        }
        Some(batch)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let step = if let Share::OfBatches { parts, .. } = self.share { parts } else { 1 };
        let to_come = self.end.saturating_sub(self.next).div_ceil(step);
        let left = if self.failed { 0 } else { self.in_flight.len() + to_come };
        (0, Some(left))
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.work = None;
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its samples; one of its own was reported by the panic hook.
            let _ = worker.join();
        }
    }
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, PendingState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters what became of one sample.
    fn finish(&self, position: usize, result: Result<Made, DataError>) {
        let mut state = self.lock();
        match result {
            Ok(Made { index, label, replaced, left }) => {
                state.left[position] = left;
                state.indices[position] = index;
                state.labels[position] = label;
                state.replaced += u64::from(replaced);
            }
            Err(error) => {
                if state.failure.as_ref().is_none_or(|(earlier, _)| position < *earlier) {
                    state.failure = Some((position, error));
                }
            }
        }
        state.remaining -= 1;
        if state.remaining == 0 {
            self.done.notify_one();
        }
    }

    /// Waits for the last sample and takes the batch out.
    fn wait(mut pending: Arc<Self>, shared: &Arc<Shared>) -> Result<RawBatch, DataError> {
        drop(
            pending
                .done
                .wait_while(pending.lock(), |state| state.remaining > 0)
                .unwrap_or_else(PoisonError::into_inner),
        );
        // The worker that made the last sample lets go of the batch right after it said so.
        let Pending { memory, state, .. } = loop {
            match Arc::try_unwrap(pending) {
                Ok(pending) => break pending,
                Err(shared) => pending = shared,
            }
            thread::yield_now();
        };
        let state = state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, error)) = state.failure {
            return Err(error);
        }
        let (views, left) = match memory {
            Memory::Views(memory) => (memory.into_views(), None),
            Memory::Pixels(memory) | Memory::Slots(memory) => {
                (memory.into_views(), Some(Arc::new(state.left)))
            }
        };
        let batch = LoadedBatch {
            views,
            labels: Tensor::from_slice(&state.labels),
            indices: state.indices,
            replaced: state.replaced,
        };
        Ok(RawBatch { batch, left, shared: shared.clone() })
    }
}

/// A thread's tools, and the memory that it uses again from image to image.
struct Worker {
    shared: Arc<Shared>,
    epoch: u64,
    items: Receiver<Item>,
    stop: Arc<AtomicBool>,
    encoded: Vec<u8>,
    image: Rgb,
    scratch: Scratch,
}

/// What was decoded of an image, into the thread's own.
struct Decoded {
    origin: (u32, u32),
    shrink: u32,
    /// What was drawn for each view.
    plans: Vec<Plan>,
}

/// What went into a place of the batch.
struct Made {
    index: u64,
    label: i64,
    replaced: bool,
    left: Left,
}

impl Worker {
    fn run(mut self) {
        while let Ok(Item { batch, position, index }) = self.items.recv() {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let made = panic::catch_unwind(AssertUnwindSafe(|| self.make(&batch.memory, position, index)));
            let made = made.unwrap_or_else(|payload| {
                // What the panic left behind is not trusted with the next image.
                self.image = Rgb::default();
                self.scratch = Scratch::default();
                let dataset = &self.shared.dataset;
                let (path, image) = (dataset.path().to_owned(), dataset.image_name(index as usize));
                Err(DataError::Panic { path, image, message: panic_message(payload.as_ref()) })
            });
            batch.finish(position, made);
        }
    }

    /// Makes every view of one sample in its place.
    fn make(&mut self, memory: &Memory, position: usize, index: u64) -> Result<Made, DataError> {
        let shared = self.shared.clone();
        let (used, decoded) = match self.fetch(index, index)? {
            Ok(decoded) => (index, decoded),
            Err(reason) => self.fetch_replacement(index, reason)?,
        };
        let mut lap = shared.clock.start();
        let region = Region { pixels: &self.image, origin: decoded.origin, shrink: decoded.shrink };
        let plans = decoded.plans;
        let views = shared.views.iter().zip(&plans);
        let mut cuts = Vec::new();
        match memory {
            Memory::Views(memory) => {
                for ((view, plan), out) in views.zip(memory.sample(position)) {
                    view.make(&region, plan, &mut self.scratch, out);
                }
            }
            Memory::Pixels(memory) => {
                for ((view, plan), out) in views.zip(memory.sample(position)) {
                    view.make_pixels(&region, plan, &mut self.scratch, out);
                }
            }
            Memory::Slots(memory) => {
                let slot = memory.sample(position).pop().expect("one tensor has the slots");
                cuts = cut::fill(slot, &region, &shared.views, &plans, &mut self.scratch);
            }
        }
        let left = Left { cuts, operations: plans.into_iter().map(|plan| plan.operations).collect() };
        lap.end(Work::Augment);
        let label = shared.dataset.labels().map_or(-1, |labels| labels[used as usize]);
        Ok(Made { index: used, label, replaced: used != index, left })
    }

    /// Reads image `index` and decodes what the views of sample `sample` see of it; the inner error is the reason why it does
    /// not decode.
    fn fetch(&mut self, sample: u64, index: u64) -> Result<Result<Decoded, String>, DataError> {
        let shared = self.shared.clone();
        let mut lap = shared.clock.start();
        match shared.dataset.read_into(index as usize, &mut self.encoded) {
            Err(DataError::Corrupt { reason, .. }) => return Ok(Err(reason)),
            read => read?,
        }
        lap.end(Work::Read);
        let decoded = self.decode(sample);
        lap.end(Work::Decode);
        Ok(decoded)
    }

    fn decode(&mut self, sample: u64) -> Result<Decoded, String> {
        let Shared { views, seed, decode, .. } = &*self.shared;
        let encoded = Encoded::open(&self.encoded)?;
        let plans = views.iter().zip(purpose::VIEW..).map(|(view, purpose)| {
            let mut rng = Rng::keyed(*seed, self.epoch, sample, purpose);
            view.draw(encoded.width, encoded.height, &mut rng)
        });
        let plans: Vec<Plan> = plans.collect();
        let crops = || plans.iter().map(|plan| plan.crop);
        let part = crops().reduce(CropBox::around).unwrap_or_else(|| encoded.whole());
        let shrink = match decode {
            Decode::Exact => 1,
            Decode::Fast => {
                views.iter().zip(crops()).map(|(view, crop)| view.shrink(crop)).min().unwrap_or(1)
            }
        };
        let Region { origin, shrink, .. } = encoded.decode(part, shrink, &mut self.image)?;
        Ok(Decoded { origin, shrink, plans })
    }

    /// Applies the policy to a corrupt image: an error, or another image in its place.
    fn fetch_replacement(&mut self, index: u64, reason: String) -> Result<(u64, Decoded), DataError> {
        let shared = self.shared.clone();
        if shared.on_error == OnError::Fail {
            return Err(shared.dataset.corrupt(index, reason));
        }
        shared.warn_once(index, &reason);
        let mut rng = Rng::keyed(shared.seed, self.epoch, index, purpose::REPLACEMENT);
        for _ in 0..REPLACEMENT_TRIES {
            let other = rng.below(shared.dataset.len() as u64);
            match self.fetch(index, other)? {
                Ok(decoded) => return Ok((other, decoded)),
                Err(reason) => shared.warn_once(other, &reason),
            }
        }
        let (path, image) = (shared.dataset.path().to_owned(), shared.dataset.image_name(index as usize));
        Err(DataError::TooManyCorrupt { path, image, reason, tries: REPLACEMENT_TRIES })
    }
}

impl Shared {
    fn warn_once(&self, index: u64, reason: &str) {
        if self.warned.lock().unwrap_or_else(PoisonError::into_inner).insert(index) {
            let path = self.dataset.path().display();
            let image = self.dataset.image_name(index as usize);
            tracing::warn!("{path}: {image} is corrupt and is replaced by another: {reason}");
        }
    }
}
