//! Operations and their steps as spans for an OpenTelemetry collector (feature `otlp`). Where it is the environment says, as
//! OpenTelemetry has it (opentelemetry.io, "OpenTelemetry Protocol Exporter"); nothing is sent when it does not. What is in a
//! span is what is in the log's lines: no secret. Not here: what the spans are.

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tracing::Subscriber;
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::Layer;
use tracing_subscriber::registry::LookupSpan;

/// What says where the collector is.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];

/// Sends spans, until it is dropped: then it sends what is left, for 5 seconds at most.
pub(crate) struct Sender(SdkTracerProvider);

impl Drop for Sender {
    fn drop(&mut self) {
        if let Err(error) = self.0.shutdown() {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

/// The sender and its layer; none when no collector is named. To be called within the runtime that is to send.
///
/// # Errors
/// What is wrong with the environment, a sentence.
pub(super) fn start<S>(service: &'static str) -> Result<Option<(Sender, impl Layer<S>)>, String>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    if !ENDPOINTS.iter().any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty())) {
        return Ok(None);
    }
    let exporter = SpanExporter::builder().with_tonic().build();
    Ok(Some(send(service, exporter.map_err(|error| format!("spans cannot be sent: {error}"))?)))
}

fn send<S>(service: &'static str, exporter: SpanExporter) -> (Sender, OpenTelemetryLayer<S, SdkTracer>)
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    // OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES are read by the builder; a name that is set here would win.
    let resource = match std::env::var_os("OTEL_SERVICE_NAME") {
        Some(_) => Resource::builder().build(),
        None => Resource::builder().with_service_name(service).build(),
    };
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer(service));
    (Sender(provider), layer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_otlp::WithExportConfig;
    use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
        TraceService, TraceServiceServer,
    };
    use opentelemetry_proto::tonic::collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
    };
    use opentelemetry_proto::tonic::trace::v1::Span;
    use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response, Status};
    use tracing_subscriber::layer::SubscriberExt;

    struct FakeCollector(mpsc::UnboundedSender<ExportTraceServiceRequest>);

    #[tonic::async_trait]
    impl TraceService for FakeCollector {
        async fn export(
            &self,
            request: Request<ExportTraceServiceRequest>,
        ) -> Result<Response<ExportTraceServiceResponse>, Status> {
            self.0.send(request.into_inner()).unwrap();
            Ok(Response::new(ExportTraceServiceResponse::default()))
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_operation_and_its_steps_reach_a_collector() {
        let (told, mut received) = mpsc::unbounded_channel();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server =
            tonic::transport::Server::builder().add_service(TraceServiceServer::new(FakeCollector(told)));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let exporter =
            SpanExporter::builder().with_tonic().with_endpoint(format!("http://{address}")).build();
        let (sender, layer) = send("tether-storage-agent", exporter.unwrap());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let _operation = tracing::info_span!("operation", verb = "export", volume = "a/b").entered();
            let _step = tracing::info_span!("step", step = "create-backstore").entered();
            let failed = tracing::info_span!("step", step = "enable", otel.status_code = "ERROR");
            drop(failed.entered());
        });
        tokio::task::spawn_blocking(move || drop(sender)).await.unwrap();
        let spans = received.recv().await.expect("a request").resource_spans.remove(0);
        let service = spans.resource.unwrap().attributes;
        assert!(format!("{service:?}").contains("tether-storage-agent"), "{service:?}");
        let spans: Vec<_> = spans.scope_spans.into_iter().flat_map(|scope| scope.spans).collect();
        let of =
            |name: &str| spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no {name}"));
        assert!(format!("{:?}", of("operation").attributes).contains("a/b"));
        let steps: Vec<_> = spans.iter().filter(|span| span.name == "step").collect();
        let is_of = |span: &&&Span, step: &str| format!("{:?}", span.attributes).contains(step);
        let done = steps.iter().find(|span| is_of(span, "create-backstore")).expect("the step that was done");
        assert_eq!(done.parent_span_id, of("operation").span_id);
        let failed = steps.iter().find(|span| is_of(span, "enable")).expect("the step that failed");
        assert_eq!(
            failed.status.as_ref().map(opentelemetry_proto::tonic::trace::v1::Status::code),
            Some(StatusCode::Error)
        );
    }
}
