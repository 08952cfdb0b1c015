//! The gate that every call passes before anything of its request is read: does its caller have the role that the RPC needs?
//! Not here: the roles (`tether_proto::Role`), and who has which (`roles`).

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tether_proto::Role;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

use crate::audit::{Call, Refusal, Refusals};
use crate::failure::{Failure, Reason};
use crate::roles::Caller;

/// Puts the gate before the services.
#[derive(Debug, Clone)]
pub(crate) struct GateLayer(pub(crate) Refusals);

impl<S> Layer<S> for GateLayer {
    type Service = Gate<S>;
    fn layer(&self, services: S) -> Gate<S> {
        Gate { services, refusals: self.0.clone() }
    }
}

/// The services behind the gate.
#[derive(Debug, Clone)]
pub(crate) struct Gate<S> {
    services: S,
    refusals: Refusals,
}

impl<S> Service<Request<Body>> for Gate<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.services.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        match self.check(&request) {
            Ok(call) => {
                request.extensions_mut().insert(call);
                Box::pin(self.services.call(request))
            }
            Err(status) => {
                let response = status.into_http();
                Box::pin(async move { Ok(response) })
            }
        }
    }
}

impl<S> Gate<S> {
    fn check(&self, request: &Request<Body>) -> Result<Call, Status> {
        let path = request.uri().path();
        let rpc = path.rsplit('/').next().unwrap_or(path);
        let Some(caller) = request.extensions().get::<Arc<Caller>>() else {
            return Err(Failure::new(Reason::Internal, "the connection has no caller").into());
        };
        let Some(needed) = Role::needed(path) else {
            return Err(Status::unimplemented("the agent has no such RPC"));
        };
        if caller.role.is_some_and(|role| role >= needed) {
            return Ok(Call { caller: caller.clone(), rpc: rpc.to_owned() });
        }
        let failure = wrong_role(caller, rpc, needed);
        self.refusals.write(&Refusal {
            caller: Some(caller),
            peer: caller.peer,
            rpc: Some(rpc),
            reason: failure.reason.as_str(),
            error: &failure.message,
        });
        Err(failure.into())
    }
}

fn wrong_role(caller: &Caller, rpc: &str, needed: Role) -> Failure {
    let who = &caller.who;
    let has = match caller.role {
        Some(role) => format!("has the role {role}"),
        None => "has no role".to_owned(),
    };
    let next = match caller.peer {
        Some(_) => format!(
            "call with a certificate of that role (tether pki issue {needed} NAME), or name this one's OU, CN, DNS or URI for \
             it in [server.roles] of the agent's config"
        ),
        None => format!("call as root, or name {who} for that role in [server.roles] of the agent's config"),
    };
    Failure::new(Reason::WrongRole, format!("{rpc} needs the role {needed}, and {who} {has}"))
        .at("authorise")
        .next(next)
}
