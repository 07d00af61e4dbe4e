//! IDX, the format of MNIST and Fashion-MNIST: a magic number, big-endian sizes, then bytes. Often gzipped.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};

use super::error::DataError;
use super::pack::Split;

const IMAGES: &str = "-images-idx3-ubyte";

/// Grey images of one size and, where there is a labels file, their labels.
pub(super) struct Idx {
    pub height: u32,
    pub width: u32,
    pixels: Vec<u8>,
    pub labels: Option<Vec<i64>>,
}

impl Idx {
    /// Reads an images file, and the labels file of the same name beside it.
    pub fn open(path: &Path) -> Result<Idx, DataError> {
        let (sizes, pixels) = read_idx(path, 3)?;
        let [count, height, width] = [sizes[0], sizes[1], sizes[2]];
        if height == 0 || width == 0 {
            return Err(refuse(path, format!("its images are {width} × {height}")));
        }
        let labels = match labels_path(path) {
            Some(path) => {
                let (sizes, labels) = read_idx(&path, 1)?;
                if sizes[0] != count {
                    let reason =
                        format!("there are {count} images, and {} labels in {}", sizes[0], path.display());
                    return Err(refuse(&path, reason));
                }
                Some(labels.into_iter().map(i64::from).collect())
            }
            None => None,
        };
        Ok(Idx { height, width, pixels, labels })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.pixels.len() / (self.height as usize * self.width as usize)
    }

    /// One image as a grey PNG, the same bytes every time.
    pub fn encode(&self, index: usize) -> Vec<u8> {
        let size = self.height as usize * self.width as usize;
        let pixels = &self.pixels[index * size..(index + 1) * size];
        // Small images: the choice of filter decides a tenth of the size and costs microseconds.
        [FilterType::NoFilter, FilterType::Up, FilterType::Paeth]
            .into_iter()
            .map(|filter| {
                let mut png = Vec::new();
                PngEncoder::new_with_quality(&mut png, CompressionType::Best, filter)
                    .write_image(pixels, self.width, self.height, ExtendedColorType::L8)
                    .expect("a grey image of matching size can be written to memory");
                png
            })
            .min_by_key(Vec::len)
            .expect("there are three filters")
    }
}

/// Whether the file starts like an IDX file of images, gzipped or not.
pub(super) fn is_idx(path: &Path) -> bool {
    let mut magic = [0; 4];
    reader(path).is_ok_and(|mut file| file.read_exact(&mut magic).is_ok()) && magic == [0, 0, 8, 3]
}

/// The images file of a split in a directory of IDX files; `None` if it holds none at all.
pub(super) fn find_images(directory: &Path, split: Option<Split>) -> Result<Option<PathBuf>, DataError> {
    let entries = fs::read_dir(directory).map_err(DataError::io("list", directory))?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.strip_suffix(".gz").unwrap_or(&name).ends_with(IMAGES)
        })
        .collect();
    if found.is_empty() {
        return Ok(None);
    }
    found.sort();
    let prefix = match split {
        Some(Split::Train) => "train",
        Some(Split::Test) => "t10k",
        None => "",
    };
    found.retain(|path| path.file_name().unwrap_or_default().to_string_lossy().starts_with(prefix));
    match <[_; 1]>::try_from(found) {
        Ok([only]) => Ok(Some(only)),
        Err(found) if found.is_empty() => {
            Err(refuse(directory, format!("it has IDX files, but none named {prefix}{IMAGES}[.gz]")))
        }
        Err(found) if split.is_none() => {
            let reason = format!(
                "it has {} sets of IDX files: choose with --split train or --split test",
                found.len()
            );
            Err(refuse(directory, reason))
        }
        Err(found) => {
            let names: Vec<_> = found.iter().map(|path| path.display().to_string()).collect();
            Err(refuse(directory, format!("it is not clear which file to take: {}", names.join(", "))))
        }
    }
}

fn labels_path(images: &Path) -> Option<PathBuf> {
    let name = images.file_name()?.to_str()?.replace("images-idx3", "labels-idx1");
    let plain = name.strip_suffix(".gz").unwrap_or(&name).to_owned();
    [plain.clone(), plain + ".gz"]
        .into_iter()
        .map(|name| images.with_file_name(name))
        .find(|path| path != images && path.exists())
}

fn refuse(path: &Path, reason: String) -> DataError {
    DataError::Source { path: path.to_owned(), reason }
}

fn reader(path: &Path) -> std::io::Result<Box<dyn Read>> {
    let mut magic = [0; 2];
    let gzipped = File::open(path)?.read_exact(&mut magic).is_ok() && magic == [0x1f, 0x8b];
    let file = BufReader::new(File::open(path)?);
    Ok(if gzipped { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) })
}

/// The sizes and the bytes of an IDX file of unsigned bytes.
fn read_idx(path: &Path, dimensions: u8) -> Result<(Vec<u32>, Vec<u8>), DataError> {
    let mut bytes = Vec::new();
    reader(path).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(DataError::io("read", path))?;
    let header = 4 + 4 * usize::from(dimensions);
    if bytes.len() < header || bytes[..4] != [0, 0, 8, dimensions] {
        let reason = format!("it is not an IDX file of unsigned bytes with {dimensions} dimensions");
        return Err(refuse(path, reason));
    }
    let (sizes, _) = bytes[4..header].as_chunks::<4>();
    let sizes: Vec<u32> = sizes.iter().map(|&size| u32::from_be_bytes(size)).collect();
    let expected = sizes.iter().try_fold(1_usize, |product, &size| product.checked_mul(size as usize));
    if expected != Some(bytes.len() - header) {
        let reason =
            format!("its header promises {sizes:?} bytes and it has {}: it is damaged", bytes.len() - header);
        return Err(refuse(path, reason));
    }
    bytes.drain(..header);
    Ok((sizes, bytes))
}
