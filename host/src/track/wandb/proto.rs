//! The messages of wandb-core's protocol that this host sends and reads, with their field numbers. What a message has
//! beyond the fields here is passed over.

#![expect(clippy::large_enum_variant, reason = "a message lives for a moment, and the wire knows no boxes")]

use prost::{Enumeration, Message, Oneof};

/// A request on the socket.
#[derive(Clone, PartialEq, Message)]
pub struct ServerRequest {
    /// Comes back in the response.
    #[prost(string, tag = "10")]
    pub request_id: String,
    #[prost(oneof = "RequestKind", tags = "1, 2, 3, 4, 7")]
    pub kind: Option<RequestKind>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum RequestKind {
    /// A record without a response.
    #[prost(message, tag = "1")]
    Publish(Record),
    /// A record with a response.
    #[prost(message, tag = "2")]
    Communicate(Record),
    #[prost(message, tag = "3")]
    InformInit(InformInit),
    #[prost(message, tag = "4")]
    InformFinish(Inform),
    #[prost(message, tag = "7")]
    InformTeardown(Teardown),
}

/// A response on the socket.
#[derive(Clone, PartialEq, Message)]
pub struct ServerResponse {
    #[prost(string, tag = "10")]
    pub request_id: String,
    #[prost(oneof = "ResponseKind", tags = "2, 200")]
    pub kind: Option<ResponseKind>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum ResponseKind {
    #[prost(message, tag = "2")]
    Result(Outcome),
    #[prost(message, tag = "200")]
    Error(ServerError),
}

#[derive(Clone, PartialEq, Message)]
pub struct ServerError {
    #[prost(string, tag = "1")]
    pub message: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Empty {}

/// Which run a message is about: its id.
#[derive(Clone, PartialEq, Message)]
pub struct Info {
    #[prost(string, tag = "1")]
    pub stream_id: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct InformInit {
    #[prost(message, optional, tag = "1")]
    pub settings: Option<Settings>,
    #[prost(message, optional, tag = "200")]
    pub info: Option<Info>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Inform {
    #[prost(message, optional, tag = "200")]
    pub info: Option<Info>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Teardown {
    #[prost(int32, tag = "1")]
    pub exit_code: i32,
}

/// A step of a run's life, kept in its transaction log, or a request about it.
#[derive(Clone, PartialEq, Message)]
pub struct Record {
    #[prost(oneof = "RecordKind", tags = "3, 6, 8, 12, 13, 17, 18, 21, 100")]
    pub kind: Option<RecordKind>,
    #[prost(message, optional, tag = "16")]
    pub control: Option<Control>,
    #[prost(message, optional, tag = "200")]
    pub info: Option<Info>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum RecordKind {
    #[prost(message, tag = "3")]
    Summary(SummaryRecord),
    #[prost(message, tag = "6")]
    Files(FilesRecord),
    #[prost(message, tag = "8")]
    Artifact(ArtifactRecord),
    #[prost(message, tag = "12")]
    Metric(MetricRecord),
    #[prost(message, tag = "13")]
    OutputRaw(OutputRawRecord),
    #[prost(message, tag = "17")]
    Run(RunRecord),
    #[prost(message, tag = "18")]
    Exit(RunExitRecord),
    #[prost(message, tag = "21")]
    Header(Empty),
    #[prost(message, tag = "100")]
    Request(Request),
}

#[derive(Clone, PartialEq, Message)]
pub struct Control {
    #[prost(bool, tag = "1")]
    pub req_resp: bool,
    /// The request's id.
    #[prost(string, tag = "4")]
    pub mailbox_slot: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Request {
    #[prost(oneof = "RequestType", tags = "10, 11, 13, 83")]
    pub kind: Option<RequestType>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum RequestType {
    #[prost(message, tag = "10")]
    PartialHistory(PartialHistoryRequest),
    #[prost(message, tag = "11")]
    RunStart(RunStartRequest),
    #[prost(message, tag = "13")]
    LogArtifact(LogArtifactRequest),
    #[prost(message, tag = "83")]
    ProbeSystemInfo(Empty),
}

/// What a communicated record comes to.
#[derive(Clone, PartialEq, Message)]
pub struct Outcome {
    #[prost(oneof = "OutcomeKind", tags = "17, 18, 100")]
    pub kind: Option<OutcomeKind>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum OutcomeKind {
    #[prost(message, tag = "17")]
    Run(RunUpdateResult),
    #[prost(message, tag = "18")]
    Exit(RunExitResult),
    #[prost(message, tag = "100")]
    Response(Response),
}

#[derive(Clone, PartialEq, Message)]
pub struct Response {
    #[prost(oneof = "ResponseType", tags = "28, 30")]
    pub kind: Option<ResponseType>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum ResponseType {
    #[prost(message, tag = "28")]
    RunStart(Empty),
    #[prost(message, tag = "30")]
    LogArtifact(LogArtifactResponse),
}

#[derive(Clone, PartialEq, Message)]
pub struct RunRecord {
    #[prost(string, tag = "1")]
    pub run_id: String,
    #[prost(string, tag = "2")]
    pub entity: String,
    #[prost(string, tag = "3")]
    pub project: String,
    #[prost(message, optional, tag = "4")]
    pub config: Option<ConfigRecord>,
    #[prost(string, tag = "6")]
    pub run_group: String,
    #[prost(string, tag = "7")]
    pub job_type: String,
    #[prost(string, tag = "8")]
    pub display_name: String,
    #[prost(string, tag = "9")]
    pub notes: String,
    #[prost(string, repeated, tag = "10")]
    pub tags: Vec<String>,
    #[prost(string, tag = "12")]
    pub sweep_id: String,
    #[prost(string, tag = "13")]
    pub host: String,
    /// The server's answer: the first step that it does not have.
    #[prost(int64, tag = "14")]
    pub starting_step: i64,
    #[prost(message, optional, tag = "17")]
    pub start_time: Option<Timestamp>,
    /// The server's answer: the run was there.
    #[prost(bool, tag = "18")]
    pub resumed: bool,
    #[prost(bool, tag = "24")]
    pub resume: bool,
    #[prost(message, optional, tag = "200")]
    pub info: Option<Info>,
}

#[derive(Clone, PartialEq, Message)]
pub struct RunUpdateResult {
    #[prost(message, optional, tag = "1")]
    pub run: Option<RunRecord>,
    #[prost(message, optional, tag = "2")]
    pub error: Option<ErrorInfo>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ErrorInfo {
    #[prost(string, tag = "1")]
    pub message: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct RunStartRequest {
    #[prost(message, optional, tag = "1")]
    pub run: Option<RunRecord>,
    #[prost(message, optional, tag = "200")]
    pub info: Option<Info>,
}

#[derive(Clone, PartialEq, Message)]
pub struct RunExitRecord {
    #[prost(int32, tag = "1")]
    pub exit_code: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct RunExitResult {
    #[prost(bool, tag = "1")]
    pub timed_out: bool,
}

/// A key with a value in JSON, as history, configuration and summary have them.
#[derive(Clone, PartialEq, Message)]
pub struct Item {
    #[prost(string, tag = "1")]
    pub key: String,
    /// Instead of `key`: the way to a nested one.
    #[prost(string, repeated, tag = "2")]
    pub nested_key: Vec<String>,
    #[prost(string, tag = "16")]
    pub value_json: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ConfigRecord {
    #[prost(message, repeated, tag = "1")]
    pub update: Vec<Item>,
}

#[derive(Clone, PartialEq, Message)]
pub struct SummaryRecord {
    #[prost(message, repeated, tag = "1")]
    pub update: Vec<Item>,
}

#[derive(Clone, PartialEq, Message)]
pub struct PartialHistoryRequest {
    #[prost(message, repeated, tag = "1")]
    pub item: Vec<Item>,
    #[prost(message, optional, tag = "2")]
    pub step: Option<HistoryStep>,
    #[prost(message, optional, tag = "3")]
    pub action: Option<HistoryAction>,
}

#[derive(Clone, PartialEq, Message)]
pub struct HistoryStep {
    #[prost(int64, tag = "1")]
    pub num: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct HistoryAction {
    /// Whether the step is complete with this.
    #[prost(bool, tag = "1")]
    pub flush: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct MetricRecord {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub glob_name: String,
    /// The metric that is its horizontal axis.
    #[prost(string, tag = "4")]
    pub step_metric: String,
    #[prost(message, optional, tag = "6")]
    pub options: Option<MetricOptions>,
}

#[derive(Clone, PartialEq, Message)]
pub struct MetricOptions {
    #[prost(bool, tag = "1")]
    pub step_sync: bool,
    #[prost(bool, tag = "2")]
    pub hidden: bool,
    #[prost(bool, tag = "3")]
    pub defined: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct OutputRawRecord {
    #[prost(enumeration = "OutputType", tag = "1")]
    pub output_type: i32,
    #[prost(message, optional, tag = "2")]
    pub timestamp: Option<Timestamp>,
    #[prost(string, tag = "3")]
    pub line: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Enumeration)]
#[repr(i32)]
pub enum OutputType {
    Stderr = 0,
    Stdout = 1,
}

#[derive(Clone, PartialEq, Message)]
pub struct FilesRecord {
    #[prost(message, repeated, tag = "1")]
    pub files: Vec<FilesItem>,
}

#[derive(Clone, PartialEq, Message)]
pub struct FilesItem {
    /// Relative to the folder `files` of the run.
    #[prost(string, tag = "1")]
    pub path: String,
    #[prost(enumeration = "FileType", tag = "3")]
    pub file_type: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Enumeration)]
#[repr(i32)]
pub enum FileType {
    Other = 0,
    Media = 2,
}

#[derive(Clone, PartialEq, Message)]
pub struct LogArtifactRequest {
    #[prost(message, optional, tag = "1")]
    pub artifact: Option<ArtifactRecord>,
    #[prost(int64, tag = "2")]
    pub history_step: i64,
    #[prost(string, tag = "3")]
    pub staging_dir: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct LogArtifactResponse {
    #[prost(string, tag = "1")]
    pub artifact_id: String,
    #[prost(string, tag = "2")]
    pub error_message: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ArtifactRecord {
    #[prost(string, tag = "1")]
    pub run_id: String,
    #[prost(string, tag = "2")]
    pub project: String,
    #[prost(string, tag = "3")]
    pub entity: String,
    #[prost(string, tag = "4")]
    pub artifact_type: String,
    #[prost(string, tag = "5")]
    pub name: String,
    #[prost(string, tag = "6")]
    pub digest: String,
    #[prost(string, tag = "7")]
    pub description: String,
    /// JSON.
    #[prost(string, tag = "8")]
    pub metadata: String,
    #[prost(bool, tag = "9")]
    pub user_created: bool,
    #[prost(string, repeated, tag = "11")]
    pub aliases: Vec<String>,
    #[prost(message, optional, tag = "12")]
    pub manifest: Option<ArtifactManifest>,
    #[prost(bool, tag = "14")]
    pub finalize: bool,
    #[prost(string, tag = "15")]
    pub client_id: String,
    #[prost(string, tag = "16")]
    pub sequence_client_id: String,
    #[prost(string, tag = "20")]
    pub digest_algorithm: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ArtifactManifest {
    #[prost(int32, tag = "1")]
    pub version: i32,
    #[prost(string, tag = "2")]
    pub storage_policy: String,
    #[prost(message, repeated, tag = "3")]
    pub storage_policy_config: Vec<StoragePolicyConfigItem>,
    #[prost(message, repeated, tag = "4")]
    pub contents: Vec<ArtifactManifestEntry>,
}

#[derive(Clone, PartialEq, Message)]
pub struct StoragePolicyConfigItem {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(string, tag = "2")]
    pub value_json: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ArtifactManifestEntry {
    #[prost(string, tag = "1")]
    pub path: String,
    /// MD5 in base64.
    #[prost(string, tag = "2")]
    pub digest: String,
    #[prost(int64, tag = "4")]
    pub size: i64,
    #[prost(string, tag = "6")]
    pub local_path: String,
    #[prost(bool, tag = "8")]
    pub skip_cache: bool,
}

/// What wandb-core is told of its surroundings; each value is a message, so that it may be missing.
#[derive(Clone, PartialEq, Message)]
pub struct Settings {
    #[prost(message, optional, tag = "1")]
    pub args: Option<ListString>,
    #[prost(message, optional, tag = "13")]
    pub executable: Option<StringValue>,
    #[prost(message, optional, tag = "30")]
    pub offline: Option<BoolValue>,
    #[prost(message, optional, tag = "32")]
    pub os: Option<StringValue>,
    /// Seconds since 1970.
    #[prost(message, optional, tag = "41")]
    pub start_time: Option<DoubleValue>,
    /// The process whose memory and processor time are measured.
    #[prost(message, optional, tag = "42")]
    pub stats_pid: Option<Int32Value>,
    #[prost(message, optional, tag = "55")]
    pub api_key: Option<StringValue>,
    #[prost(message, optional, tag = "57")]
    pub base_url: Option<StringValue>,
    #[prost(message, optional, tag = "60")]
    pub console: Option<StringValue>,
    #[prost(message, optional, tag = "65")]
    pub disable_job_creation: Option<BoolValue>,
    #[prost(message, optional, tag = "69")]
    pub entity: Option<StringValue>,
    #[prost(message, optional, tag = "77")]
    pub host: Option<StringValue>,
    /// Seconds.
    #[prost(message, optional, tag = "79")]
    pub init_timeout: Option<DoubleValue>,
    #[prost(message, optional, tag = "85")]
    pub log_dir: Option<StringValue>,
    #[prost(message, optional, tag = "86")]
    pub log_internal: Option<StringValue>,
    #[prost(message, optional, tag = "92")]
    pub mode: Option<StringValue>,
    #[prost(message, optional, tag = "95")]
    pub program: Option<StringValue>,
    #[prost(message, optional, tag = "97")]
    pub project: Option<StringValue>,
    #[prost(message, optional, tag = "102")]
    pub resume: Option<StringValue>,
    #[prost(message, optional, tag = "105")]
    pub root_dir: Option<StringValue>,
    #[prost(message, optional, tag = "106")]
    pub run_group: Option<StringValue>,
    #[prost(message, optional, tag = "107")]
    pub run_id: Option<StringValue>,
    #[prost(message, optional, tag = "109")]
    pub run_mode: Option<StringValue>,
    #[prost(message, optional, tag = "110")]
    pub run_name: Option<StringValue>,
    #[prost(message, optional, tag = "129")]
    pub sweep_id: Option<StringValue>,
    #[prost(message, optional, tag = "133")]
    pub sync_dir: Option<StringValue>,
    #[prost(message, optional, tag = "134")]
    pub sync_file: Option<StringValue>,
    #[prost(message, optional, tag = "139")]
    pub timespec: Option<StringValue>,
    #[prost(message, optional, tag = "142")]
    pub wandb_dir: Option<StringValue>,
    #[prost(message, optional, tag = "165")]
    pub disable_update_check: Option<BoolValue>,
    /// Seconds.
    #[prost(message, optional, tag = "174")]
    pub stats_sampling_interval: Option<DoubleValue>,
    #[prost(message, optional, tag = "177")]
    pub allow_offline_artifacts: Option<BoolValue>,
    #[prost(message, optional, tag = "182")]
    pub primary: Option<BoolValue>,
    #[prost(message, optional, tag = "183")]
    pub update_finish_state: Option<BoolValue>,
    #[prost(message, optional, tag = "202")]
    pub app_url: Option<StringValue>,
    /// Seconds between two times that the transaction log goes to the disk.
    #[prost(message, optional, tag = "209")]
    pub transaction_log_flush_interval: Option<DoubleValue>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ListString {
    #[prost(string, repeated, tag = "1")]
    pub value: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub struct StringValue {
    #[prost(string, tag = "1")]
    pub value: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct BoolValue {
    #[prost(bool, tag = "1")]
    pub value: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct Int32Value {
    #[prost(int32, tag = "1")]
    pub value: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct DoubleValue {
    #[prost(double, tag = "1")]
    pub value: f64,
}

/// Seconds since 1970, and nanoseconds within the second.
#[derive(Clone, PartialEq, Message)]
pub struct Timestamp {
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

impl From<&str> for StringValue {
    fn from(value: &str) -> Self {
        StringValue { value: value.to_owned() }
    }
}

impl From<f64> for Timestamp {
    fn from(time: f64) -> Self {
        Timestamp { seconds: time.floor() as i64, nanos: (time.fract() * 1e9) as i32 }
    }
}
