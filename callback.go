// POST /api/sse/callback: it authenticates a gateway's callback, reads it, and routes a connect to the service that the
// stream is for. How services work is not known here; see tasks.go, version.go and page.go.

package main

import (
	"cmp"
	"log/slog"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
)

// maxCallback is more than the JSON of the longest target and headers that a gateway takes from a browser.
const maxCallback = 256 << 10

// streamService is a service that a connect is routed to.
type streamService interface {
	// OnConnect makes the stream the connection of the service's id, which checkID has passed. It returns the event that
	// begins the stream, and whether it ends after that. The error is errBadID (of a task on a page stream), errNoRoom,
	// errTooManyTasks or errAskFirst.
	OnConnect(id string, c connectRequest) (open event, end bool, err error)
}

// callbackHandler is POST /api/sse/callback, by which a gateway asks who may connect and tells who left.
type callbackHandler struct {
	secret   secret                   // "" accepts every callback
	services map[string]streamService // by name
	conns    *ConnectionManager
	heard    func(features) // told what the gateway says it can do
	log      *slog.Logger
	closing  *atomic.Bool

	wrongSecrets, badIDs throttle
}

// connectAnswer is the answer to a connect callback.
type connectAnswer struct {
	Event     event  `json:"event"`
	Close     bool   `json:"close,omitempty"`
	Heartbeat string `json:"heartbeat,omitempty"`
}

var (
	errUnknownAction = badRequest("unknown_action", "unknown action")
	errWrongSecret   = newError(http.StatusUnauthorized, "unauthorized", "missing or wrong secret")
	errStreamOver    = newError(http.StatusGone, "stream_finished", "this stream is finished")
	errGatewayGone   = newError(http.StatusServiceUnavailable, "gateway_gone", "the gateway does not know this stream")
)

func (h *callbackHandler) serve(w http.ResponseWriter, r *http.Request) (status int, answer any, err error) {
	if h.secret != "" && !sameSecret(r.URL.Query().Get("secret"), h.secret) {
		h.wrongSecrets.log(h.log, slog.LevelWarn, "callback with a missing or wrong secret", "remote", r.RemoteAddr)
		return 0, nil, errWrongSecret
	}
	body, err := readBody(w, r, maxCallback)
	if err != nil {
		return 0, nil, err
	}
	c, err := parseCallback(body)
	if err != nil {
		return 0, nil, err
	}
	c.order = r.Header.Get(orderHeader)
	can := parseFeatures(r.Header.Get(featuresHeader))
	h.heard(can)
	return h.take(c, can)
}

// take does what a callback of a gateway with these features asks for, and returns its answer.
func (h *callbackHandler) take(c callback, can features) (status int, answer any, err error) {
	if c.action == "disconnect" {
		h.conns.OnDisconnect(c.token)
		return http.StatusOK, struct{}{}, nil
	}
	answer, err = h.connect(c, can)
	return http.StatusOK, answer, err
}

// connect decides on a stream.
func (h *callbackHandler) connect(c callback, can features) (a connectAnswer, err error) {
	if h.closing.Load() {
		return a, errClosing
	}
	path, query := parseTarget(c.url)
	request := connectRequest{
		token:       c.token,
		lastEventID: cmp.Or(c.lastEventID, query.Get("lastEventId")),
		taskIDs:     query["task_id"],
		order:       parseOrder(c.order),
		probes:      can.known,
	}
	service, key := route(path)
	switch {
	case service == "":
		h.log.Debug("refusing a stream whose URL leads nowhere", "url", c.url)
		return a, badRequest("cannot_route", "Cannot route URL: "+c.url)
	case request.lastEventID == closeID:
		return a, errStreamOver
	case len(query["request_id"]) > 1:
		return a, badRequest("duplicate_field", "request_id is given twice in the URL")
	case len(query["task_id"]) > 1 && service != servicePage:
		return a, badRequest("duplicate_field", "task_id is given twice in the URL")
	}
	id := query.Get(key)
	err = cmp.Or(checkID(id), errAskFirst)
	// The first try asks nobody. If that is needed, the next one asks, and again if another connection has come since.
	for tries := 0; err == errAskFirst; tries++ {
		if tries > 0 && (tries > 3 || !h.conns.Ask(service+":"+id, &request)) {
			return a, errGatewayGone
		}
		a.Event, a.Close, err = h.services[service].OnConnect(id, request)
	}
	if err == errBadID {
		ids := strings.Join(slices.Concat(query["request_id"], request.taskIDs), " ")
		h.badIDs.log(h.log, slog.LevelWarn, "refusing a stream with a bad ID", "id", strconv.Quote(ids[:min(len(ids), 4*maxID)]))
	}
	if !can.retry {
		a.Event.Retry = 0
	}
	if query.Get("heartbeat") == "event" {
		a.Heartbeat = "event"
	}
	a.Close = a.Close || h.closing.Load() // since the look above; EndAll may not have seen it
	return a, err
}

// underPath reports whether path is prefix or below it.
func underPath(path, prefix string) bool { return strings.HasPrefix(path+"/", prefix+"/") }

// route returns the service that a stream with this path is for, or "", and the key of its ID in the query.
func route(path string) (service, key string) {
	switch {
	case underPath(path, "/api/sse/tasks"):
		return serviceTask, "task_id"
	case underPath(path, "/api/sse/utils/version"):
		return serviceVersion, "request_id"
	case underPath(path, "/api/sse/stream"):
		return servicePage, "request_id"
	}
	return "", ""
}

// parseTarget splits the request target of a stream into its path and the values of our keys in its query. The path is
// "" unless it is clean and without escapes, and our keys are spelled literally. So a proxy in front that decides by the
// normalized path, or by the first key in any case, decides by what is routed here. The last of several values counts,
// and is the first here.
func parseTarget(target string) (streamPath string, values url.Values) {
	streamPath, query, _ := strings.Cut(target, "?")
	clean := path.Clean(streamPath)
	if streamPath != clean && streamPath != clean+"/" || strings.ContainsAny(streamPath, `%\`) || strings.Contains(target, "#") {
		return "", nil
	}
	values = url.Values{}
	for _, pair := range slices.Backward(strings.Split(query, "&")) {
		key, value, _ := strings.Cut(pair, "=")
		decoded, _ := url.QueryUnescape(key)
		for _, ours := range []string{"task_id", "request_id", "lastEventId", "heartbeat"} {
			if !strings.EqualFold(decoded, ours) {
				continue
			}
			if key != ours {
				return "", nil
			}
			value, _ = url.QueryUnescape(value) // "" if it cannot be decoded
			values.Add(ours, value)
		}
	}
	return streamPath, values
}

func parseCallback(body []byte) (c callback, err error) {
	var action, token, reason, request, target, headers, lastEventID []byte
	err = pick(body, member{"action", &action, nil}, member{"token", &token, nil}, member{"reason", &reason, nil},
		member{"request", &request, []member{{"url", &target, nil},
			{"headers", &headers, []member{{"last-event-id", &lastEventID, nil}}}}})
	if err != nil {
		return c, err
	}
	read := func(raw []byte) (s string) {
		if err == nil {
			s, err = parseString(raw)
		}
		return s
	}
	c.action, c.token, c.url, c.lastEventID = read(action), read(token), read(target), read(lastEventID)
	read(reason)
	skipHeader := func(_ []byte, i int) int { return skipString(headers, i) }
	badHeaders := headers != nil && scanObject(headers, new(bool), skipHeader) != nil // they are strings in an object
	switch {
	case err != nil || badHeaders || request != nil && request[0] != '{':
		return c, errFieldType
	case c.action == "" || c.token == "" || c.action == "connect" && c.url == "":
		return c, errMissingField
	case c.action != "connect" && c.action != "disconnect": // a disconnect needs nothing but its token
		return c, errUnknownAction
	}
	return c, nil
}
