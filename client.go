// The client side of HTTP between processes: one dial, one POST, and errors without secrets. Roles and bodies are not
// known here; gateway.go and ask.go post.

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// dialLimit bounds a dial, and a TLS handshake. A Transport goes on with them after the request has ended that they are
// for.
const dialLimit = 5 * time.Second

// dial connects to localhost by its addresses, as a container with nothing but the binary has no /etc/hosts, and to any
// other host as usual.
func dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: dialLimit}
	if port, ok := strings.CutPrefix(addr, "localhost:"); ok {
		if conn, err := d.DialContext(ctx, network, "127.0.0.1:"+port); err == nil {
			return conn, nil
		}
		addr = "[::1]:" + port
	}
	return d.DialContext(ctx, network, addr)
}

// postTo makes one POST. It returns at most limit bytes of the answer's body, and the status also if reading the body
// failed.
func postTo(ctx context.Context, transport http.RoundTripper, target string, header http.Header, body []byte, limit int64) (status int, answer []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target, bytes.NewReader(body))
	if err != nil {
		return 0, nil, withoutSecrets(err)
	}
	req.Header = header
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return 0, nil, withoutSecrets(err)
	}
	answer, err = readAnswer(resp, limit)
	return resp.StatusCode, answer, err
}

// readAnswer reads at most limit bytes of the body of a response, and closes it. The connection is used again only if
// that is all. What follows a 101 has no end and no deadline (RFC 9110 section 15.2.2).
func readAnswer(resp *http.Response, limit int64) ([]byte, error) {
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return nil, errors.New("reading the answer: unasked change of protocol")
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit))
	if err != nil {
		return nil, fmt.Errorf("reading the answer: %w", withoutSecrets(err))
	}
	return body, nil
}

// withoutSecrets removes from a client's error what may repeat a secret: the URL, and what it quotes of an answer that
// is not HTTP. What it quotes of a certificate may stay.
func withoutSecrets(err error) error {
	if e := (*url.Error)(nil); errors.As(err, &e) {
		err = e.Err
	}
	text, isCertificate := err.Error(), errors.As(err, new(*tls.CertificateVerificationError))
	if strings.Contains(text, "malformed") || strings.Contains(text, `"`) && !isCertificate {
		return errors.New("the answer is not HTTP")
	}
	return err
}
