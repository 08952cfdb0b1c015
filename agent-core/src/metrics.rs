//! Prometheus metrics, served over HTTP on an address of their own: what operations and their steps came to and how long they
//! took, and what an agent measures when it is asked. Not here: what an agent has to measure.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// What an agent measures may take this long; then the rest is told without it. Prometheus itself waits for 10 s.
const MEASURE_DEADLINE: Duration = Duration::from_secs(6);
/// How long a whole connection may last: one question, one answer.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(30);
/// How many may ask at once.
const CONNECTIONS: usize = 8;
/// A step may be a sysfs write or the wait for a guest.
const BUCKETS: [f64; 12] = [0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 60.0];

/// What became of an operation or a step: `ok`, or the failure's reason.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    verb: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepLabels {
    verb: &'static str,
    step: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailedStepLabels {
    verb: &'static str,
    step: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerbLabels {
    verb: &'static str,
}

/// One measured value.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The metric, without `tether_`, its unit last: `pool_size_bytes`.
    pub name: &'static str,
    /// What it tells.
    pub help: &'static str,
    /// Which one it is of.
    pub labels: Vec<(&'static str, String)>,
    /// Its value.
    pub value: f64,
}

/// What an agent measures when it is asked.
pub type Measure = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Vec<Sample>> + Send>> + Send + Sync>;

/// A [`Measure`] from what an agent does.
pub fn measure<F>(work: impl Fn() -> F + Send + Sync + 'static) -> Measure
where
    F: Future<Output = Vec<Sample>> + Send + 'static,
{
    Box::new(move || Box::pin(work()))
}

/// A [`Measure`] of what asks the kernel and programs, beside `known`, which does not wait for anything. When the first takes
/// too long it is left out, with `measured` 0, and not begun again before it has ended: each time would leave a thread in
/// the kernel.
pub fn measure_beside<F, K>(
    work: impl Fn() -> F + Send + Sync + 'static,
    known: impl Fn() -> K + Send + Sync + 'static,
) -> Measure
where
    F: Future<Output = Vec<Sample>> + Send + 'static,
    K: Future<Output = Vec<Sample>> + Send + 'static,
{
    let under_way = Arc::new(Semaphore::new(1));
    measure(move || {
        let turn = under_way.clone().try_acquire_owned().ok();
        let working = turn.map(|turn| {
            let work = work();
            tokio::spawn(async move {
                let samples = work.await;
                drop(turn);
                samples
            })
        });
        let known = known();
        async move {
            let measured = match working {
                Some(working) => timeout(MEASURE_DEADLINE, working).await.ok().and_then(Result::ok),
                None => None,
            };
            let complete = measured.is_some();
            let mut samples = measured.unwrap_or_default();
            samples.extend(known.await);
            samples.push(Sample {
                name: "measured",
                help: "1 when all that is measured is here; 0 when it took too long and is missing",
                labels: Vec::new(),
                value: f64::from(u8::from(complete)),
            });
            samples
        }
    })
}

type Durations<L> = Family<L, Histogram, fn() -> Histogram>;

/// All metrics of an agent.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    operations: Family<OperationLabels, Counter>,
    operation_seconds: Durations<VerbLabels>,
    step_seconds: Durations<StepLabels>,
    failed_steps: Family<FailedStepLabels, Counter>,
    measured: Measured,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(BUCKETS);
        let (operation_seconds, step_seconds) =
            (Family::new_with_constructor(histogram), Family::new_with_constructor(histogram));
        let (operations, failed_steps) = (Family::default(), Family::default());
        let measured = Measured::default();
        let mut registry = Registry::with_prefix("tether");
        registry.register(
            "operations",
            "Operations that ended, by verb and outcome: ok or a reason",
            operations.clone(),
        );
        registry.register_with_unit(
            "operation",
            "How long operations took",
            Unit::Seconds,
            operation_seconds.clone(),
        );
        registry.register_with_unit("step", "How long steps took", Unit::Seconds, step_seconds.clone());
        registry.register("failed_steps", "Steps that failed, by reason", failed_steps.clone());
        registry.register_collector(Box::new(measured.clone()));
        Self {
            registry: Arc::new(registry),
            operations,
            operation_seconds,
            step_seconds,
            failed_steps,
            measured,
        }
    }
}

impl Metrics {
    /// An operation ended.
    pub(crate) fn operation(&self, verb: &'static str, outcome: &'static str, took: Duration) {
        self.operations.get_or_create(&OperationLabels { verb, outcome }).inc();
        self.operation_seconds.get_or_create(&VerbLabels { verb }).observe(took.as_secs_f64());
    }

    /// A step ended; `reason` is that of its failure.
    pub(crate) fn step(
        &self,
        verb: &'static str,
        step: &'static str,
        took: Duration,
        reason: Option<&'static str>,
    ) {
        self.step_seconds.get_or_create(&StepLabels { verb, step }).observe(took.as_secs_f64());
        if let Some(reason) = reason {
            self.failed_steps.get_or_create(&FailedStepLabels { verb, step, reason }).inc();
        }
    }

    /// All of it, in Prometheus' text format.
    async fn text(&self, measure: &Measure) -> Result<String, fmt::Error> {
        let mut samples = measure().await;
        samples.push(Sample {
            name: "build_info",
            help: "The agent's version",
            labels: vec![("version", env!("CARGO_PKG_VERSION").to_owned())],
            value: 1.0,
        });
        self.measured.set(samples);
        let mut encoded = String::new();
        text::encode(&mut encoded, &self.registry)?;
        Ok(encoded)
    }
}

/// What was measured last.
#[derive(Debug, Clone, Default)]
struct Measured(Arc<Mutex<Vec<Sample>>>);

impl Measured {
    fn set(&self, samples: Vec<Sample>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = samples;
    }
}

impl Collector for Measured {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut by_name = BTreeMap::<&str, Vec<Sample>>::new();
        for sample in samples {
            by_name.entry(sample.name).or_default().push(sample);
        }
        for (name, samples) in by_name {
            let help = samples.first().map_or("", |sample| sample.help);
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for sample in samples {
                ConstGauge::new(sample.value).encode(metric.encode_family(&sample.labels)?)?;
            }
        }
        Ok(())
    }
}

/// Serves `/metrics` until `shutdown`.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(
    address: SocketAddr,
    metrics: Metrics,
    measure: Measure,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    tokio::spawn(accept(listener, metrics, measure, shutdown));
    Ok(())
}

async fn accept(listener: TcpListener, metrics: Metrics, measure: Measure, shutdown: CancellationToken) {
    let (places, measure) = (Arc::new(Semaphore::new(CONNECTIONS)), Arc::new(measure));
    loop {
        // A place first: who comes too many waits in the kernel's queue.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let (metrics, measure) = (metrics.clone(), measure.clone());
                tokio::spawn(async move {
                    let _place = place;
                    if timeout(CONNECTION_DEADLINE, answer(stream, metrics, measure)).await.is_err() {
                        tracing::debug!("somebody who asked for metrics took too long");
                    }
                });
            }
            Err(error) => {
                tracing::error!(%error, "nobody can ask for metrics now");
                if timeout(Duration::from_secs(1), shutdown.cancelled()).await.is_ok() {
                    return;
                }
            }
        }
    }
}

async fn answer(stream: TcpStream, metrics: Metrics, measure: Arc<Measure>) {
    let service = service_fn(|request: Request<Incoming>| {
        let (metrics, measure) = (metrics.clone(), measure.clone());
        async move { Ok::<_, Infallible>(respond(&request, &metrics, &measure).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(5))
        .keep_alive(false)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a question for metrics");
    }
}

async fn respond(request: &Request<Incoming>, metrics: &Metrics, measure: &Measure) -> Response<Full<Bytes>> {
    let short = |status: StatusCode, words: &'static str| {
        let mut response = Response::new(Full::from(words));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return short(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
    }
    if request.method() != Method::GET {
        return short(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
    }
    match metrics.text(measure).await {
        Ok(text) => {
            let mut response = Response::new(Full::from(text));
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
            response
        }
        Err(error) => {
            tracing::error!(%error, "metrics cannot be written");
            short(StatusCode::INTERNAL_SERVER_ERROR, "see the agent's log\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn what_was_done_and_what_is_measured_is_told_and_nothing_else() {
        let metrics = Metrics::default();
        metrics.operation("attach", "ok", Duration::from_millis(300));
        metrics.operation("attach", "DOMAIN_NOT_FOUND", Duration::from_millis(3));
        metrics.step("attach", "login", Duration::from_millis(200), None);
        metrics.step("attach", "plug", Duration::from_millis(1), Some("LIBVIRT_FAILED"));
        let work = || async {
            let labels = vec![("pool", "a \"pool\"".to_owned())];
            vec![Sample { name: "pool_size_bytes", help: "Size", labels, value: 1e12 }]
        };
        let measure = measure_beside(work, || std::future::ready(Vec::new()));
        let (listener, shutdown) =
            (TcpListener::bind("127.0.0.1:0").await.unwrap(), CancellationToken::new());
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(accept(listener, metrics, measure, shutdown.clone()));
        let told = ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        for line in [
            "tether_operations_total{verb=\"attach\",outcome=\"ok\"} 1",
            "tether_operations_total{verb=\"attach\",outcome=\"DOMAIN_NOT_FOUND\"} 1",
            "tether_operation_seconds_count{verb=\"attach\"} 2",
            "tether_step_seconds_bucket{le=\"0.25\",verb=\"attach\",step=\"login\"} 1",
            "tether_failed_steps_total{verb=\"attach\",step=\"plug\",reason=\"LIBVIRT_FAILED\"} 1",
            "tether_pool_size_bytes{pool=\"a \\\"pool\\\"\"} 1000000000000.0",
            "tether_measured{} 1.0",
            "# EOF",
        ] {
            assert!(told.lines().any(|told| told == line), "{line} is not in:\n{told}");
        }
        assert!(ask(address, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.starts_with("HTTP/1.1 404"));
        assert!(ask(address, "POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.starts_with("HTTP/1.1 405"));
        shutdown.cancel();
        serving.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_too_long_to_measure_holds_up_nothing_else() {
        let metrics = Metrics::default();
        metrics.operation("export", "ok", Duration::from_millis(1));
        let begun = Arc::new(Mutex::new(0));
        let count = begun.clone();
        let never = move || {
            *count.lock().unwrap() += 1;
            std::future::pending()
        };
        let known =
            || async { vec![Sample { name: "stuck_keys", help: "Stuck", labels: Vec::new(), value: 1.0 }] };
        let measure = measure_beside(never, known);
        for _ in 0..3 {
            let told = metrics.text(&measure).await.unwrap();
            assert!(told.contains("tether_measured{} 0.0\n") && told.contains("verb=\"export\""), "{told}");
            assert!(told.contains("tether_stuck_keys{} 1.0\n"), "{told}");
        }
        assert_eq!(*begun.lock().unwrap(), 1, "it is under way, and not begun again");
    }
}
