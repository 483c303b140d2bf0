//! Admitters: who may refuse a request once its candidates and their data are known.

mod probabilistic;

pub use probabilistic::ProbabilisticAdmitter;
