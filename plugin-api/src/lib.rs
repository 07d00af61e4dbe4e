//! Everything a plugin author needs.
