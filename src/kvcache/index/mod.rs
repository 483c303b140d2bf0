//! Which endpoints hold which blocks.
