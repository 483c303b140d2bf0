//! Data keys (`<data type>/<producer instance>`) and the columns they address.
//!
//! While plugins are built, each asks [`DataKeys`] for the columns it writes and reads; the answer
//! is a typed position, so that a request never looks anything up by name. Afterwards the
//! configuration checks that every required key has a producer.

use std::any::Any;
use std::marker::PhantomData;

use super::PluginError;

/// Instances of `inflight-load-producer` a configuration may have; more is a start-up error.
pub const MAX_IN_FLIGHT_PRODUCERS: usize = 4;

/// Which in-flight producer's counters of an endpoint to use. The default is the first slot, which
/// always belongs to the producer called `inflight-load-producer`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct InFlightSlot(u8);

impl InFlightSlot {
    /// Position among an endpoint's counters, below [`MAX_IN_FLIGHT_PRODUCERS`].
    pub fn position(self) -> usize {
        usize::from(self.0)
    }
}

/// Position of a per-request, per-candidate column of `T`.
pub struct Column<T> {
    slot: usize,
    of: PhantomData<fn() -> T>,
}

impl<T> Clone for Column<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Column<T> {}

impl<T> std::fmt::Debug for Column<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Column({})", self.slot)
    }
}

/// Who makes and who needs a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyUse {
    /// Data type, for example `PrefixCacheMatchInfoDataKey`.
    pub data_type: &'static str,
    /// Instance name of the producer.
    pub producer: String,
    /// Rust type of a value, to catch a producer and consumer that disagree.
    pub value_type: &'static str,
    /// Instance names that publish it.
    pub produced_by: Vec<String>,
    /// Instance names that cannot work without it.
    pub required_by: Vec<String>,
    /// Instance names that read it when present.
    pub optional_for: Vec<String>,
}

/// Collects the keys of one configuration while its plugins are built.
#[derive(Debug, Default)]
pub struct DataKeys {
    keys: Vec<KeyUse>,
    in_flight: Vec<String>,
    current: String,
}

impl DataKeys {
    /// Names the instance being built; the following calls are its own.
    pub fn enter(&mut self, instance: &str) {
        instance.clone_into(&mut self.current);
    }

    /// The current instance publishes `data_type` under its own name.
    pub fn produce<T: 'static>(&mut self, data_type: &'static str) -> Column<T> {
        let (producer, me) = (self.current.clone(), self.current.clone());
        let slot = self.slot::<T>(data_type, &producer);
        self.keys[slot].produced_by.push(me);
        Column {
            slot,
            of: PhantomData,
        }
    }

    /// The current instance publishes `data_type` under `producer` instead of its own name.
    pub fn produce_as<T: 'static>(&mut self, data_type: &'static str, producer: &str) -> Column<T> {
        let slot = self.slot::<T>(data_type, producer);
        self.keys[slot].produced_by.push(self.current.clone());
        Column {
            slot,
            of: PhantomData,
        }
    }

    /// The current instance cannot work without `data_type` from the instance called `producer`.
    pub fn require<T: 'static>(&mut self, data_type: &'static str, producer: &str) -> Column<T> {
        let me = self.current.clone();
        let slot = self.slot::<T>(data_type, producer);
        self.keys[slot].required_by.push(me);
        Column {
            slot,
            of: PhantomData,
        }
    }

    /// The current instance reads `data_type` from `producer` when it is there.
    pub fn optional<T: 'static>(&mut self, data_type: &'static str, producer: &str) -> Column<T> {
        let me = self.current.clone();
        let slot = self.slot::<T>(data_type, producer);
        self.keys[slot].optional_for.push(me);
        Column {
            slot,
            of: PhantomData,
        }
    }

    /// Every column of `data_type` that some instance publishes.
    pub fn published<T: 'static>(&self, data_type: &str) -> Vec<Column<T>> {
        let slots = self.keys.iter().enumerate();
        slots
            .filter(|(_, k)| k.data_type == data_type && !k.produced_by.is_empty())
            .filter(|(_, k)| k.value_type == std::any::type_name::<T>())
            .map(|(slot, _)| Column {
                slot,
                of: PhantomData,
            })
            .collect()
    }

    /// Live counters of the in-flight producer called `producer`; same slot for every caller.
    pub fn in_flight(&mut self, producer: &str) -> Result<InFlightSlot, PluginError> {
        let position = self.in_flight.iter().position(|name| name == producer);
        let position = position.unwrap_or_else(|| {
            self.in_flight.push(producer.to_owned());
            self.in_flight.len() - 1
        });
        match u8::try_from(position) {
            Ok(slot) if position < MAX_IN_FLIGHT_PRODUCERS => Ok(InFlightSlot(slot)),
            _ => Err(PluginError::Invalid(format!(
                "more than {MAX_IN_FLIGHT_PRODUCERS} inflight-load-producer instances"
            ))),
        }
    }

    /// Everything declared so far.
    pub fn keys(&self) -> &[KeyUse] {
        &self.keys
    }

    /// An attribute store that can hold every declared column.
    pub fn new_attributes(&self) -> Attributes {
        Attributes {
            columns: self.keys.iter().map(|_| None).collect(),
        }
    }

    fn slot<T: 'static>(&mut self, data_type: &'static str, producer: &str) -> usize {
        let found = self
            .keys
            .iter()
            .position(|k| k.data_type == data_type && k.producer == producer);
        found.unwrap_or_else(|| {
            self.keys.push(KeyUse {
                data_type,
                producer: producer.to_owned(),
                value_type: std::any::type_name::<T>(),
                produced_by: Vec::new(),
                required_by: Vec::new(),
                optional_for: Vec::new(),
            });
            self.keys.len() - 1
        })
    }
}

/// The columns of one request: for each key one value per candidate, in candidate order. Reused
/// between requests, so that a warm column costs no allocation.
#[derive(Debug, Default)]
pub struct Attributes {
    columns: Vec<Option<ColumnData>>,
}

#[derive(Debug)]
struct ColumnData {
    values: Box<dyn Any + Send>,
    written: bool,
}

impl Attributes {
    /// The values of `column`, one per candidate; `None` when its producer wrote nothing.
    pub fn get<T: Send + 'static>(&self, column: Column<T>) -> Option<&[T]> {
        let data = self
            .columns
            .get(column.slot)?
            .as_ref()
            .filter(|d| d.written)?;
        data.values.downcast_ref::<Vec<T>>().map(Vec::as_slice)
    }

    /// An empty vector to fill with one value per candidate; marks the column as written.
    pub fn write<T: Send + 'static>(&mut self, column: Column<T>) -> &mut Vec<T> {
        let values = self.reuse(column);
        values.clear();
        values
    }

    /// As [`Self::write`], still with the values of an earlier request, for a producer that takes
    /// their memory over.
    pub fn reuse<T: Send + 'static>(&mut self, column: Column<T>) -> &mut Vec<T> {
        if self.columns.len() <= column.slot {
            self.columns.resize_with(column.slot + 1, || None);
        }
        let cell = &mut self.columns[column.slot];
        let usable = cell.as_ref().is_some_and(|d| d.values.is::<Vec<T>>());
        if !usable {
            *cell = None;
        }
        let data = cell.get_or_insert_with(|| ColumnData {
            values: Box::new(Vec::<T>::new()),
            written: false,
        });
        data.written = true;
        #[expect(
            clippy::expect_used,
            reason = "the box was made for this type three lines up"
        )]
        let values = data.values.downcast_mut::<Vec<T>>().expect("column type");
        values
    }

    /// Forgets all values, keeping their memory.
    pub fn clear(&mut self) {
        for data in self.columns.iter_mut().flatten() {
            data.written = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consumer_finds_the_producers_column() {
        let mut keys = DataKeys::default();
        keys.enter("scorer");
        let read = keys.require::<u32>("Match", "maker");
        keys.enter("maker");
        let write = keys.produce::<u32>("Match");
        let mut attributes = keys.new_attributes();
        assert_eq!(attributes.get(read), None);
        attributes.write(write).extend([7, 9]);
        assert_eq!(attributes.get(read), Some(&[7, 9][..]));
        attributes.clear();
        assert_eq!(attributes.get(read), None);
    }

    #[test]
    fn a_fifth_in_flight_producer_is_refused() {
        let mut keys = DataKeys::default();
        for name in ["a", "b", "c", "d", "a"] {
            assert!(keys.in_flight(name).is_ok());
        }
        assert!(keys.in_flight("e").is_err());
    }
}
