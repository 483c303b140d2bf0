//! Data keys (`<data type>/<producer instance>`) and the columns they address.
//!
//! While plugins are built, each asks [`DataKeys`] for the columns it writes and reads; the answer
//! is a typed position, so that a request never looks anything up by name. Afterwards the
//! configuration checks that every required key has a producer and that both sides mean the same type.
//!
//! A [`Column`] lives for one request and has a value for each candidate. An [`EndpointColumn`]
//! addresses a value that stays on the endpoint until its producer replaces it.

use std::any::Any;
use std::borrow::Cow;
use std::marker::PhantomData;
use std::sync::Arc;

use super::PluginError;

/// Instances of `inflight-load-producer` a configuration may have; more is a start-up error.
pub const MAX_IN_FLIGHT_PRODUCERS: usize = 4;

/// Request columns the process may have, over all configurations it loads; more is an error.
pub const MAX_COLUMNS: usize = 512;

/// Endpoint columns the process may have, over all configurations it loads; more is an error.
pub const MAX_ENDPOINT_COLUMNS: usize = 64;

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

/// Position of a value of type `T` that is kept on each endpoint.
pub struct EndpointColumn<T> {
    slot: usize,
    of: PhantomData<fn() -> T>,
}

impl<T> EndpointColumn<T> {
    /// Position among an endpoint's attributes, below [`MAX_ENDPOINT_COLUMNS`].
    pub fn position(self) -> usize {
        self.slot
    }
}

impl<T> Clone for EndpointColumn<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for EndpointColumn<T> {}

impl<T> std::fmt::Debug for EndpointColumn<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EndpointColumn({})", self.slot)
    }
}

/// Who makes and who needs a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyUse {
    /// Data type, for example `PrefixCacheMatchInfoDataKey`.
    pub data_type: Cow<'static, str>,
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

impl KeyUse {
    fn new<T>(data_type: Cow<'static, str>, producer: &str) -> Self {
        Self {
            data_type,
            producer: producer.to_owned(),
            value_type: std::any::type_name::<T>(),
            produced_by: Vec::new(),
            required_by: Vec::new(),
            optional_for: Vec::new(),
        }
    }

    fn is(&self, data_type: &str, producer: &str) -> bool {
        self.data_type == data_type && self.producer == producer
    }

    fn users(&mut self, role: Role) -> &mut Vec<String> {
        match role {
            Role::Produces => &mut self.produced_by,
            Role::Requires => &mut self.required_by,
            Role::Reads => &mut self.optional_for,
        }
    }

    /// False for a key that only an earlier configuration used.
    pub fn is_used(&self) -> bool {
        !(self.produced_by.is_empty()
            && self.required_by.is_empty()
            && self.optional_for.is_empty())
    }

    /// Notes a user; false when it means another type than the users before it.
    fn note(&mut self, user: &str, role: Role, value_type: &'static str) -> bool {
        if !self.is_used() {
            self.value_type = value_type;
        }
        self.users(role).push(user.to_owned());
        self.value_type == value_type
    }
}

/// What an instance has to do with a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Produces,
    Requires,
    Reads,
}

/// One thing an instance asked of [`DataKeys`] while it was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declaration {
    on_endpoint: bool,
    slot: usize,
    role: Role,
    value_type: &'static str,
}

/// Collects the keys of one configuration while its plugins are built.
///
/// Slots outlive a configuration: after [`Self::restart`] the same key gets the same slot, so that
/// values already on endpoints and requests in flight stay readable.
#[derive(Debug, Clone, Default)]
pub struct DataKeys {
    columns: Vec<KeyUse>,
    endpoint: Vec<KeyUse>,
    in_flight: Vec<String>,
    mismatches: Vec<String>,
    current: String,
    declared: Vec<Declaration>,
    /// Objects for instances built later, by the name of the instance that is behind them.
    offers: Vec<(String, Arc<dyn Any + Send + Sync>)>,
}

impl DataKeys {
    /// Lets instances that are built later use `value`, by the name of the instance behind it.
    pub fn offer<T: Send + Sync + 'static>(&mut self, name: &str, value: T) {
        self.offers.push((name.to_owned(), Arc::new(value)));
    }

    /// What the instance called `name` offers; `None` when it is not there or offers something else.
    pub fn offered<T: Clone + 'static>(&self, name: &str) -> Option<T> {
        let (_, value) = self.offers.iter().find(|(n, _)| n == name)?;
        value.downcast_ref::<T>().cloned()
    }

    /// Names the instance being built; the following calls are its own.
    pub fn enter(&mut self, instance: &str) {
        instance.clone_into(&mut self.current);
        self.declared.clear();
    }

    /// What the current instance declared, to be given to [`Self::declare_again`].
    pub fn declared(&mut self) -> Vec<Declaration> {
        std::mem::take(&mut self.declared)
    }

    /// The current instance was built for an earlier configuration and is used again: its columns are
    /// still the right ones, because slots outlive configurations.
    pub fn declare_again(&mut self, declarations: &[Declaration]) {
        for declaration in declarations {
            self.note(declaration.clone());
        }
    }

    /// Forgets who uses what and keeps every slot: the start of another configuration.
    pub fn restart(&mut self) {
        self.mismatches.clear();
        self.offers.clear();
        for key in self.columns.iter_mut().chain(&mut self.endpoint) {
            key.produced_by.clear();
            key.required_by.clear();
            key.optional_for.clear();
        }
    }

    /// The current instance publishes `data_type` under its own name.
    pub fn produce<T: 'static>(&mut self, data_type: impl Into<Cow<'static, str>>) -> Column<T> {
        let producer = self.current.clone();
        self.produce_as(data_type, &producer)
    }

    /// The current instance publishes `data_type` under `producer` instead of its own name.
    pub fn produce_as<T: 'static>(
        &mut self,
        data_type: impl Into<Cow<'static, str>>,
        producer: &str,
    ) -> Column<T> {
        self.column(data_type.into(), producer, Role::Produces)
    }

    /// The current instance cannot work without `data_type` from the instance called `producer`.
    pub fn require<T: 'static>(
        &mut self,
        data_type: impl Into<Cow<'static, str>>,
        producer: &str,
    ) -> Column<T> {
        self.column(data_type.into(), producer, Role::Requires)
    }

    /// The current instance reads `data_type` from `producer` when it is there.
    pub fn optional<T: 'static>(
        &mut self,
        data_type: impl Into<Cow<'static, str>>,
        producer: &str,
    ) -> Column<T> {
        self.column(data_type.into(), producer, Role::Reads)
    }

    /// The current instance keeps `data_type` on endpoints, under its own name.
    pub fn endpoint_produce<T: Send + Sync + 'static>(
        &mut self,
        data_type: impl Into<Cow<'static, str>>,
    ) -> Result<EndpointColumn<T>, PluginError> {
        let producer = self.current.clone();
        self.endpoint_produce_as(data_type, &producer)
    }

    /// The current instance keeps `data_type` on endpoints, under `producer`.
    pub fn endpoint_produce_as<T: Send + Sync + 'static>(
        &mut self,
        data_type: impl Into<Cow<'static, str>>,
        producer: &str,
    ) -> Result<EndpointColumn<T>, PluginError> {
        self.endpoint_column(data_type.into(), producer, Role::Produces)
    }

    /// The current instance cannot work without what `producer` keeps on endpoints as `data_type`.
    pub fn endpoint_require<T: Send + Sync + 'static>(
        &mut self,
        data_type: impl Into<Cow<'static, str>>,
        producer: &str,
    ) -> Result<EndpointColumn<T>, PluginError> {
        self.endpoint_column(data_type.into(), producer, Role::Requires)
    }

    /// The current instance reads what `producer` keeps on endpoints as `data_type`, when it is there.
    pub fn endpoint_optional<T: Send + Sync + 'static>(
        &mut self,
        data_type: impl Into<Cow<'static, str>>,
        producer: &str,
    ) -> Result<EndpointColumn<T>, PluginError> {
        self.endpoint_column(data_type.into(), producer, Role::Reads)
    }

    /// Every column of `data_type` that an instance of a name `by` accepts publishes.
    pub fn published<T: 'static>(
        &self,
        data_type: &str,
        by: impl Fn(&str) -> bool,
    ) -> Vec<Column<T>> {
        let slots = self.columns.iter().enumerate();
        slots
            .filter(|(_, k)| k.data_type == data_type && k.produced_by.iter().any(|p| by(p)))
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

    /// The request columns declared so far, by slot.
    pub fn keys(&self) -> &[KeyUse] {
        &self.columns
    }

    /// Every key declared so far, request columns first.
    pub fn all(&self) -> impl Iterator<Item = &KeyUse> + Clone {
        self.columns.iter().chain(&self.endpoint)
    }

    /// Keys whose users disagree about the value's type or about where it is kept, as `type/producer`.
    pub fn mismatches(&self) -> &[String] {
        &self.mismatches
    }

    /// An attribute store that can hold every declared column.
    pub fn new_attributes(&self) -> Attributes {
        Attributes {
            columns: self.columns.iter().map(|_| None).collect(),
        }
    }

    fn column<T: 'static>(
        &mut self,
        data_type: Cow<'static, str>,
        producer: &str,
        role: Role,
    ) -> Column<T> {
        let found = self.columns.iter().position(|k| k.is(&data_type, producer));
        let slot = found.unwrap_or(self.columns.len());
        if slot == self.columns.len() {
            self.columns.push(KeyUse::new::<T>(data_type, producer));
        }
        self.note(Declaration {
            on_endpoint: false,
            slot,
            role,
            value_type: std::any::type_name::<T>(),
        });
        Column {
            slot,
            of: PhantomData,
        }
    }

    fn endpoint_column<T: Send + Sync + 'static>(
        &mut self,
        data_type: Cow<'static, str>,
        producer: &str,
        role: Role,
    ) -> Result<EndpointColumn<T>, PluginError> {
        let found = self
            .endpoint
            .iter()
            .position(|k| k.is(&data_type, producer));
        let slot = found.unwrap_or(self.endpoint.len());
        if slot >= MAX_ENDPOINT_COLUMNS {
            return Err(PluginError::Invalid(format!(
                "{data_type}/{producer}: more than {MAX_ENDPOINT_COLUMNS} endpoint attributes"
            )));
        }
        if slot == self.endpoint.len() {
            self.endpoint.push(KeyUse::new::<T>(data_type, producer));
        }
        self.note(Declaration {
            on_endpoint: true,
            slot,
            role,
            value_type: std::any::type_name::<T>(),
        });
        Ok(EndpointColumn {
            slot,
            of: PhantomData,
        })
    }

    /// Notes what the current instance declares, and whether it fits what others declared.
    fn note(&mut self, declaration: Declaration) {
        let (own, other) = if declaration.on_endpoint {
            (&mut self.endpoint, &self.columns)
        } else {
            (&mut self.columns, &self.endpoint)
        };
        let Some(key) = own.get_mut(declaration.slot) else {
            return;
        };
        let fits = key.note(&self.current, declaration.role, declaration.value_type);
        let elsewhere = other
            .iter()
            .any(|k| k.is(&key.data_type, &key.producer) && k.is_used());
        if elsewhere || !fits {
            self.mismatches
                .push(format!("{}/{}", key.data_type, key.producer));
        }
        self.declared.push(declaration);
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

    #[test]
    fn endpoint_columns_are_shared_by_key_and_keep_their_slot() {
        let mut keys = DataKeys::default();
        keys.enter("filter");
        let first = keys.endpoint_require::<f64>("Other", "maker").unwrap();
        let read = keys.endpoint_require::<f64>("Load", "maker").unwrap();
        keys.enter("maker");
        let write = keys.endpoint_produce::<f64>("Load").unwrap();
        assert_eq!(read.position(), write.position());
        assert_ne!(first.position(), read.position());
        assert_eq!(keys.all().filter(|k| !k.required_by.is_empty()).count(), 2);
        // The next configuration asks in another order and does not use the first key.
        keys.restart();
        keys.enter("maker");
        let again = keys.endpoint_produce::<f64>("Load").unwrap();
        assert_eq!(again.position(), write.position());
        assert!(keys.all().all(|k| k.required_by.is_empty()));
    }

    #[test]
    fn disagreeing_users_of_a_key_are_recorded() {
        let mut keys = DataKeys::default();
        keys.enter("a");
        keys.produce::<u32>("Match");
        keys.endpoint_produce::<f64>("Load").unwrap();
        keys.enter("b");
        keys.require::<u32>("Match", "a");
        keys.endpoint_optional::<f64>("Load", "a").unwrap();
        assert!(keys.mismatches().is_empty());
        keys.require::<u64>("Match", "a");
        keys.endpoint_require::<u8>("Load", "a").unwrap();
        keys.require::<f64>("Load", "a");
        assert_eq!(keys.mismatches(), ["Match/a", "Load/a", "Load/a"]);
    }

    #[test]
    fn one_endpoint_column_too_many_is_refused() {
        let mut keys = DataKeys::default();
        keys.enter("p");
        for number in 0..MAX_ENDPOINT_COLUMNS {
            let column = keys.endpoint_produce::<f64>(number.to_string()).unwrap();
            assert_eq!(column.position(), number);
        }
        assert!(keys.endpoint_produce::<f64>("more").is_err());
        assert!(
            keys.endpoint_produce::<f64>("0").is_ok(),
            "known keys stay usable"
        );
    }

    #[test]
    fn an_instance_that_is_used_again_declares_the_same_slots() {
        let mut keys = DataKeys::default();
        keys.enter("scorer");
        let read = keys.require::<u32>("Match", "maker");
        let scorer = keys.declared();
        keys.restart();
        assert!(!keys.keys()[0].is_used());
        keys.enter("scorer");
        keys.declare_again(&scorer);
        assert_eq!(keys.keys()[0].required_by, ["scorer"]);
        keys.enter("maker");
        let write = keys.produce::<u32>("Match");
        assert_eq!(read.slot, write.slot);
        assert!(keys.mismatches().is_empty());
        assert_eq!(keys.declared().len(), 1);
    }

    #[test]
    fn a_key_may_change_its_type_with_the_configuration_but_not_within_one() {
        let mut keys = DataKeys::default();
        keys.enter("maker");
        keys.produce::<u32>("Match");
        keys.restart();
        keys.enter("maker");
        keys.produce::<u64>("Match");
        assert!(keys.mismatches().is_empty());
        keys.enter("scorer");
        keys.require::<u32>("Match", "maker");
        assert_eq!(keys.mismatches(), ["Match/maker"]);
    }
}
