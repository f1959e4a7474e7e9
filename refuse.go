// Requests that get no stream: what the gateway itself refuses, and how clients are told. Whom the backend refuses is
// in ask.go.

package main

import (
	"context"
	"encoding/json"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// A client that is refused for now is held for holdTime, as some come back at once whatever they are told. If there are
// more than maxHeld, the others are not held.
const (
	holdTime = time.Second
	maxHeld  = 1000
)

// maxReason is the most bytes of the backend's reason that a client is told.
const maxReason = 256

// refusal is why a request gets no stream.
type refusal struct {
	status int
	reason string // for metrics; "" if the client has left
	text   string // for the client
}

// isTransient reports whether the client should try again.
func (refused *refusal) isTransient() bool {
	return refused.status >= 500 || refused.status == http.StatusRequestTimeout ||
		refused.status == http.StatusTooEarly || refused.status == http.StatusTooManyRequests
}

// rejection returns the refusal for the backend's answer to a connect callback. The client is told the backend's reason
// if that is {"error":"…"} and short.
func rejection(status int, body []byte) *refusal {
	refused := &refusal{status, refusedRejected, "connection rejected"}
	if refused.isTransient() {
		refused.reason = refusedBackend
	}
	o, _ := parseObject(body)
	if text, _, _ := o.str("error"); text != "" && len(text) <= maxReason {
		refused.text = text
	}
	return refused
}

// checkRequest returns what the callbacks say of a request, or why it gets no stream.
func (g *gateway) checkRequest(w http.ResponseWriter, r *http.Request) (request json.RawMessage, refused *refusal) {
	switch {
	case r.Method != http.MethodGet:
		w.Header().Set("Allow", http.MethodGet)
		return nil, &refusal{http.StatusMethodNotAllowed, refusedRequest, "a stream is opened with GET"}
	case g.isForeign(r):
		return nil, &refusal{http.StatusForbidden, refusedRequest, "request from another site"}
	case len(r.RequestURI) > maxTarget:
		return nil, &refusal{http.StatusRequestURITooLong, refusedRequest, "request target too long"}
	case !utf8.ValidString(r.RequestURI):
		return nil, &refusal{http.StatusBadRequest, refusedRequest, "request target is not UTF-8"}
	}
	request = encodeRequest(r)
	switch {
	case len(request) > maxRequest:
		return nil, &refusal{http.StatusRequestHeaderFieldsTooLarge, refusedRequest, "request header too large"}
	case hasBody(r):
		return nil, &refusal{http.StatusBadRequest, refusedRequest, "a stream request has no body"}
	case g.cfg.CallbackURL == "":
		return nil, &refusal{http.StatusServiceUnavailable, refusedBackend, "no callback URL configured"}
	}
	return request, nil
}

// hasBody reports whether the request has a body. If one in chunks turns out to be empty, it has been read to its end,
// and the connection can be taken over.
func hasBody(r *http.Request) bool {
	if r.ContentLength >= 0 {
		return r.ContentLength > 0
	}
	_, err := io.ReadFull(r.Body, make([]byte, 1))
	return err != io.EOF
}

// isForeign reports whether a browser says that the request comes from another site, unless that is CORS_ALLOW_ORIGIN.
// It is refused although it is a GET, as a new stream replaces another. Clients that are no browsers send none of these
// headers.
func (g *gateway) isForeign(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	allowed := g.cfg.CORSAllowOrigin
	if origin != "" && (allowed == "*" || strings.EqualFold(origin, allowed)) {
		return false
	}
	switch r.Header.Get("Sec-Fetch-Site") {
	case "cross-site", "same-site":
		return true
	}
	u, err := url.Parse(origin)
	return origin != "" && (err != nil || !strings.EqualFold(u.Host, r.Host))
}

// allowOrigin lets pages of CORS_ALLOW_ORIGIN read the answer.
func (g *gateway) allowOrigin(h http.Header) {
	origin := g.cfg.CORSAllowOrigin
	if origin == "" {
		return
	}
	h.Set("Access-Control-Allow-Origin", origin)
	if origin != "*" {
		h.Set("Access-Control-Allow-Credentials", "true")
		h.Set("Vary", "Origin")
	}
}

// isPreflight reports whether the request is a CORS preflight (Fetch section 3.3.2).
func (g *gateway) isPreflight(r *http.Request) bool {
	return g.cfg.CORSAllowOrigin != "" && r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != ""
}

func servePreflight(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Access-Control-Allow-Methods", http.MethodGet)
	h.Set("Access-Control-Allow-Headers", "Last-Event-ID, Cache-Control, Authorization")
	h.Set("Access-Control-Max-Age", "7200") // seconds; Chromium allows no more
	w.WriteHeader(http.StatusNoContent)
}

// refuse answers a request that gets no stream. A browser's EventSource gives up for good on any status but 200 (WHATWG
// HTML section 9.2.3), so for now it is told by a stream that ends: the browser comes back by itself.
func (g *gateway) refuse(w http.ResponseWriter, r *http.Request, refused *refusal) {
	if refused.reason != "" {
		g.met.refused.with(refused.reason).Inc()
	}
	retry := g.retry()
	if refused.isTransient() && acceptsEventStream(r) {
		s := &stream{chunked: r.ProtoAtLeast(1, 1), cfg: &g.cfg}
		if g.begin(w, s, appendComment(appendRetry(reserveChunk(nil), retry), refused.text), false) {
			g.hold(s)
		}
		return
	}
	if refused.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", strconv.Itoa((retry+999)/1000))
	}
	writeError(w, r, newError(refused.status, "", refused.text))
}

// hold ends the stream of a refused client after a while. The stream has no goroutine and is not registered.
func (g *gateway) hold(s *stream) {
	ctx, cancel := context.WithTimeout(g.life, holdTime)
	if g.held.Add(1) > maxHeld {
		cancel() // ends it at once
	}
	g.busy.Add(1)
	context.AfterFunc(ctx, func() {
		cancel()
		s.finish()
		g.held.Add(-1)
		g.busy.Add(-1)
	})
}

// retry returns a reconnection time in milliseconds. It differs from stream to stream, so that browsers that were cut
// off together do not come back together.
func (g *gateway) retry() int {
	return int(jitter(g.cfg.Retry, 2*g.cfg.Retry).Milliseconds())
}

// acceptsEventStream reports whether Accept names text/event-stream (RFC 9110 section 12.5.1).
func acceptsEventStream(r *http.Request) bool {
	for accepted := range strings.SplitSeq(strings.Join(r.Header.Values("Accept"), ","), ",") {
		mediaType, params, _ := mime.ParseMediaType(accepted)
		weight, err := strconv.ParseFloat(params["q"], 64)
		if mediaType == "text/event-stream" && (err != nil || weight > 0) {
			return true
		}
	}
	return false
}
