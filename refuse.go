// Requests that get no stream: what the gateway itself refuses, and how a client is told. Whom the backend refuses is
// in ask.go.

package main

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// A refused browser is held for holdTime, as clients exist that come back at once whatever they were told. Beyond
// maxHeld they are not.
const (
	holdTime = time.Second
	maxHeld  = 1000
)

// maxReason is how many bytes of a backend's reason a client is told.
const maxReason = 256

// refusal is why a request gets no stream.
type refusal struct {
	status int
	reason string // for the metrics; none if the client has left
	text   string // for the client
}

// isTransient reports whether it makes sense to try again.
func (no *refusal) isTransient() bool {
	return no.status >= 500 || no.status == http.StatusRequestTimeout ||
		no.status == http.StatusTooEarly || no.status == http.StatusTooManyRequests
}

// rejection is the refusal by the backend's answer to a connect callback. The client gets the backend's own reason if
// that is {"error":"…"} and short.
func rejection(status int, body []byte) *refusal {
	no := &refusal{status, refusedRejected, "connection rejected"}
	if no.isTransient() {
		no.reason = refusedBackend
	}
	var raw []byte
	if pick(body, member{"error", &raw, nil}) == nil {
		if text, err := parseString(raw); err == nil && text != "" && len(text) <= maxReason {
			no.text = text
		}
	}
	return no
}

// checkRequest returns what callbacks say of a request for a stream, or why there is none for it.
func (g *gateway) checkRequest(w http.ResponseWriter, r *http.Request) (request json.RawMessage, no *refusal) {
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

// hasBody reports whether there is a body. One in chunks may turn out to be empty; then it has been read to its end,
// and the connection is free.
func hasBody(r *http.Request) bool {
	if r.ContentLength >= 0 {
		return r.ContentLength > 0
	}
	_, err := io.ReadFull(r.Body, make([]byte, 1))
	return err != io.EOF
}

// isForeign reports whether a browser says that the request comes from another site than this, and than the one that
// may read streams. It would change something here, as a stream replaces another. What is no browser says nothing.
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

// isPreflight reports whether a browser asks if a page of another origin may send what is more than an EventSource does
// (Fetch section 3.3.2).
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
// HTML section 9.2.3), so transient trouble is told to it as a stream that ends: it comes back by itself.
func (g *gateway) refuse(w http.ResponseWriter, r *http.Request, no *refusal) {
	if no.reason != "" {
		g.met.refused.with(no.reason).Inc()
	}
	retry := g.retry()
	if no.isTransient() && acceptsEventStream(r) {
		s := &stream{chunked: r.ProtoAtLeast(1, 1), limits: &g.limits}
		if g.begin(w, s, appendComment(appendRetry(reserveChunk(nil), retry), no.text), false, 0) {
			g.hold(s)
		}
		return
	}
	if no.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", strconv.Itoa((retry+999)/1000))
	}
	writeError(w, newError(no.status, "", no.text))
}

// hold ends the stream of a refused browser after a while. It has no goroutine and is not registered, so it takes
// nobody's place.
func (g *gateway) hold(s *stream) {
	ctx, cancel := context.WithTimeout(g.holding, holdTime)
	if g.held.Add(1) > maxHeld {
		cancel()
	}
	g.busy.Add(1)
	context.AfterFunc(ctx, func() {
		cancel()
		s.finish()
		g.held.Add(-1)
		g.busy.Add(-1)
	})
}

// retry is a reconnection time in milliseconds, different for each stream so that browsers that lost theirs together do
// not return together.
func (g *gateway) retry() int {
	return int(jitter(g.cfg.Retry, 2*g.cfg.Retry).Milliseconds())
}

func acceptsEventStream(r *http.Request) bool {
	return slices.ContainsFunc(r.Header.Values("Accept"), func(v string) bool {
		return strings.Contains(strings.ToLower(v), "text/event-stream")
	})
}
