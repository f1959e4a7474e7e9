// POST /api/sse/callback: authenticate a gateway's callback, read it, and route a
// connect to the service that its stream is for. How a service works inside is not
// known here; see tasks.go and version.go.

package main

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
)

// maxCallback is more than the longest target and headers that a gateway
// takes from a browser can become in JSON.
const maxCallback = 256 << 10

// service is what a callback is routed to.
type service interface {
	// OnConnect registers the connection of the service's id. It returns the
	// event that begins its stream, and whether that ends it, or errBadID or
	// errNoRoom.
	OnConnect(id string, c connectRequest) (open event, end bool, err error)
}

// errNoRoom says that a service remembers as much as it may.
var errNoRoom = newError(http.StatusServiceUnavailable, "no_room", "too many announcements or request IDs")

// connectRequest is a stream that wants to be the connection of an
// identifier.
type connectRequest struct {
	token       string
	url         string // raw request target
	lastEventID string // its Last-Event-ID header
	order       requestOrder
}

// callbackHandler is POST /api/sse/callback, by which a gateway asks who may
// connect and tells who left.
type callbackHandler struct {
	secret  secret // "" lets everybody in
	tasks   service
	version service
	conns   *ConnectionManager
	heard   func(features string) // what the gateway says it can do
	log     *slog.Logger
	closing *atomic.Bool
}

// callback is the body.
type callback struct {
	action         string
	connectRequest // of a disconnect, only the token counts
}

// connectAnswer is the answer to a connect callback.
type connectAnswer struct {
	Event event `json:"event"`
	Close bool  `json:"close,omitempty"`
}

var (
	errUnknownAction = badRequest("unknown_action", "unknown action")
	errWrongSecret   = newError(http.StatusUnauthorized, "unauthorized", "missing or wrong secret")
	errStreamOver    = newError(http.StatusGone, "stream_finished", "this stream is finished")
)

func (h *callbackHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h.secret != "" && !sameSecret(r.URL.Query().Get("secret"), h.secret) {
		h.log.Warn("callback with a missing or wrong secret", "remote", r.RemoteAddr)
		writeError(w, errWrongSecret)
		return
	}
	var buf bytes.Buffer
	body, err := readBody(w, r, maxCallback, &buf)
	var c callback
	if err == nil {
		c, err = parseCallback(body)
	}
	if err != nil {
		writeError(w, err)
		return
	}
	h.heard(r.Header.Get(featuresHeader))
	if c.action == "disconnect" {
		h.conns.OnDisconnect(c.token)
		writeJSON(w, http.StatusOK, struct{}{})
		return
	}
	c.order = parseOrder(r.Header.Get(orderHeader))
	h.connect(w, c.connectRequest)
}

func (h *callbackHandler) connect(w http.ResponseWriter, c connectRequest) {
	switch {
	case h.closing.Load():
		writeError(w, errClosing)
		return
	case c.lastEventID == closeID:
		writeError(w, errStreamOver)
		return
	}
	service, id := h.route(c.url)
	if service == nil {
		writeError(w, badRequest("cannot_route", "Cannot route URL: "+c.url))
		return
	}
	open, end, err := service.OnConnect(id, c)
	if err != nil {
		h.log.Warn("refusing a connection", "id", strconv.Quote(id[:min(len(id), 2*maxID)]), "err", err)
		writeError(w, err)
		return
	}
	end = end || h.closing.Load() // since the look above; EndAll may have missed this stream
	writeJSON(w, http.StatusOK, connectAnswer{open, end})
}

// route finds the service and the ID that a stream's target names.
func (h *callbackHandler) route(target string) (service, string) {
	u, err := url.ParseRequestURI(target)
	if err != nil {
		return nil, ""
	}
	query := u.Query()
	switch {
	case underPath(u.Path, "/api/sse/tasks"):
		return h.tasks, query.Get("task_id")
	case underPath(u.Path, "/api/sse/utils/version"):
		return h.version, query.Get("request_id")
	}
	return nil, ""
}

// underPath reports whether path is prefix or below it.
func underPath(path, prefix string) bool {
	rest, ok := strings.CutPrefix(path, prefix)
	return ok && (rest == "" || rest[0] == '/')
}

func parseCallback(body []byte) (c callback, err error) {
	o, err := parseObject(body)
	if err != nil {
		return c, err
	}
	if c.action, err = o.required("action"); err != nil {
		return c, err
	}
	if c.action != "connect" && c.action != "disconnect" {
		return c, errUnknownAction
	}
	if c.token, err = o.required("token"); err != nil {
		return c, err
	}
	if _, _, err := o.str("reason"); err != nil {
		return c, err
	}
	raw, ok := o["request"]
	if !ok {
		if c.action == "disconnect" {
			return c, nil // the token says it all
		}
		return c, errMissingField
	}
	request, err := parseObject(raw)
	if err != nil {
		return c, errFieldType
	}
	c.url, _, err = request.str("url")
	if err == nil && c.url == "" && c.action == "connect" {
		err = errMissingField
	}
	if err != nil {
		return c, err
	}
	c.lastEventID, err = headerValue(request["headers"], "last-event-id")
	return c, err
}

// headerValue returns one of the headers of a callback, all of which must be
// strings. No headers at all are fine.
func headerValue(raw json.RawMessage, name string) (string, error) {
	if raw == nil {
		return "", nil
	}
	headers, err := parseObject(raw)
	if err != nil {
		return "", errFieldType
	}
	for name := range headers {
		if _, _, err := headers.str(name); err != nil {
			return "", err
		}
	}
	value, _, err := headers.str(name)
	return value, err
}
