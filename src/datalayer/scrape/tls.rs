//! TLS towards endpoints: whose certificates are believed, and which one we show.

use std::path::PathBuf;
use std::sync::Arc;

use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::{
    CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme,
};

use crate::datalayer::sources::HttpSource;

/// Where distributions keep the certificates they trust, most common first.
const SYSTEM_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The TLS settings of a source cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TlsSettingsError(String);

/// TLS settings of a source, made once; `None` for plain HTTP.
pub fn client_config(source: &HttpSource) -> Result<Option<Arc<ClientConfig>>, TlsSettingsError> {
    if !source.tls {
        return Ok(None);
    }
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(refuse)?;
    let builder = match (&source.ca_cert_path, source.insecure_skip_verify) {
        (Some(path), _) => {
            let mut roots = RootCertStore::empty();
            for certificate in CertificateDer::pem_file_iter(path).map_err(refuse)? {
                roots.add(certificate.map_err(refuse)?).map_err(refuse)?;
            }
            builder.with_root_certificates(roots)
        }
        (None, true) => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AcceptAny(provider))),
        (None, false) => builder.with_root_certificates(system_roots()?),
    };
    let config = match &source.client_pair {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = CertificateDer::pem_file_iter(certificate).map_err(refuse)?;
            let chain = chain.collect::<Result<_, _>>().map_err(refuse)?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(refuse)?;
            builder.with_client_auth_cert(chain, key).map_err(refuse)?
        }
    };
    Ok(Some(Arc::new(config)))
}

/// For servers of the public web: believes whom the system trusts and shows no certificate.
pub fn system_trust() -> Result<Arc<ClientConfig>, TlsSettingsError> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(refuse)?;
    let builder = builder.with_root_certificates(system_roots()?);
    Ok(Arc::new(builder.with_no_client_auth()))
}

/// For probes: believes every peer and shows no certificate.
pub fn accept_any() -> ClientConfig {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider));
    let Ok(builder) = builder.with_safe_default_protocol_versions() else {
        unreachable!("ring supports the default versions");
    };
    builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AcceptAny(provider)))
        .with_no_client_auth()
}

fn refuse(error: impl std::fmt::Display) -> TlsSettingsError {
    TlsSettingsError(error.to_string())
}

/// What the system trusts. A bundle holds certificates of all ages; those that cannot be used are
/// passed over, as long as some can.
fn system_roots() -> Result<RootCertStore, TlsSettingsError> {
    let given = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let bundles = given.into_iter().chain(SYSTEM_BUNDLES.map(PathBuf::from));
    for bundle in bundles {
        let Ok(certificates) = CertificateDer::pem_file_iter(&bundle) else {
            continue;
        };
        let mut roots = RootCertStore::empty();
        let (usable, _) = roots.add_parsable_certificates(certificates.flatten());
        if usable > 0 {
            return Ok(roots);
        }
    }
    Err(refuse(
        "no certificates of the system found: give caCertPath, or insecureSkipVerify: true",
    ))
}

/// Accepts any certificate, as every published setup of engine metrics over TLS does.
#[derive(Debug)]
struct AcceptAny(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
