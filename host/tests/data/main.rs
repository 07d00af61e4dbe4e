//! The data room against other people's code: Pillow, torchvision, h5py, and the HDF5 library.

mod color;
mod draws;
mod files;
mod fixtures;
mod fuzz;
mod loading;
mod packing;
mod pixels;
