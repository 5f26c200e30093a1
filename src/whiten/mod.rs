//! whiten
