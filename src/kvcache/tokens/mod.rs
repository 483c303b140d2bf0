//! From a request to the token ids its engine will compute.
