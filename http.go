// Bodies and answers of both roles: media types, limits, errors as JSON, bearer tokens. The roles are not known here.
// JSON itself is in json.go.

package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"io"
	"mime"
	"net/http"
	"os"
	"path"
	"strings"
	"time"
)

const jsonType = "application/json"

// readBody reads the request's body, which may have at most limit bytes.
func readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	var body bytes.Buffer
	body.Grow(int(min(max(0, r.ContentLength), limit, 4<<10)) + bytes.MinRead) // at once, if it is small
	_, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, limit))
	switch {
	case errors.As(err, new(*http.MaxBytesError)):
		return nil, errBodyTooLarge
	case err != nil:
		return nil, unreadable(err)
	}
	return body.Bytes(), nil
}

// unreadable returns what a client is told whose body could not be read to its end. If it broke off, perhaps on the way
// here, that says nothing about what the client has sent: it may try again.
func unreadable(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, os.ErrDeadlineExceeded) {
		return errBrokenOff
	}
	return errNotJSON // its chunks are malformed
}

// hasMediaType reports whether the request says that its body has that type.
func hasMediaType(r *http.Request, want string) bool {
	value := r.Header.Get("Content-Type")
	if value == want {
		return true
	}
	mediaType, _, err := mime.ParseMediaType(value)
	return err == nil && mediaType == want
}

// readJSON reads a body of at most limit bytes as one JSON object. A request without a Content-Type is accepted; one
// with another is refused, which keeps out the forms of other sites.
func readJSON(w http.ResponseWriter, r *http.Request, limit int64) (object, error) {
	body, err := readTyped(w, r, limit)
	if err != nil {
		return nil, err
	}
	return parseObject(body)
}

// readTyped is readJSON, but does not look at the JSON.
func readTyped(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	if r.Header.Get("Content-Type") != "" && !hasMediaType(r, jsonType) {
		return nil, errMediaType
	}
	return readBody(w, r, limit)
}

var (
	errBrokenOff    = newError(http.StatusRequestTimeout, "broken_off", "request body broke off")
	errBodyTooLarge = newError(http.StatusRequestEntityTooLarge, "too_large", "request body too large")
	errMediaType    = newError(http.StatusUnsupportedMediaType, "media_type", "content type must be application/json")
	errClosing      = newError(http.StatusServiceUnavailable, "shutting_down", "shutting down")
)

// writeError answers {"error":"…","code":"…"}.
func writeError(w http.ResponseWriter, r *http.Request, err error) { writeAnswer(w, r, 0, nil, err) }

func writeBody(w http.ResponseWriter, mediaType string, status int, body []byte) {
	w.Header().Set("Content-Type", mediaType)
	w.WriteHeader(status)
	w.Write(body)
}

// encodeAnswer returns what is written for the answer of a handler. An error that is no apiError becomes a 500 without
// its text.
func encodeAnswer(status int, v any, err error) (int, []byte) {
	if err != nil {
		e := newError(http.StatusInternalServerError, "internal", "internal error")
		errors.As(err, &e)
		status, v = e.status, e
	}
	return status, append(marshal(v), '\n')
}

// refusedBody is for how long the rest of a refused body is read: closing the connection while the client sends may
// destroy the answer.
const refusedBody = 500 * time.Millisecond

// handler returns the status and the body, which becomes JSON, or an error. It writes nothing but headers.
type handler func(w http.ResponseWriter, r *http.Request) (status int, answer any, err error)

func (h handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	status, answer, err := h(w, r)
	writeAnswer(w, r, status, answer, err)
}

// writeAnswer writes the answer of a handler.
func writeAnswer(w http.ResponseWriter, r *http.Request, status int, answer any, err error) {
	if err != nil && hasMediaType(r, ndjson) { // the body may go on, and net/http reads it before it answers
		w.Header().Set("Connection", "close")
		http.NewResponseController(w).SetReadDeadline(time.Now().Add(refusedBody))
	}
	status, body := encodeAnswer(status, answer, err)
	writeBody(w, jsonType, status, body)
}

// readiness returns the answer of /readyz.
func readiness(ready bool) (status int, said string) {
	if !ready {
		return http.StatusServiceUnavailable, "not_ready"
	}
	return http.StatusOK, "ready"
}

// hasBearer reports whether an Authorization header has that bearer token (RFC 6750).
func hasBearer(authorization string, want secret) bool {
	scheme, token, _ := strings.Cut(authorization, " ")
	return strings.EqualFold(scheme, "Bearer") && sameSecret(token, want)
}

// sameSecret compares in constant time. Hashing hides the length as well.
func sameSecret(got string, want secret) bool {
	a, b := sha256.Sum256([]byte(got)), sha256.Sum256([]byte(want))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

// jsonErrors answers requests that mux has no route for in JSON instead of plain text.
func jsonErrors(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if h, pattern := mux.Handler(r); pattern == "" {
			h.ServeHTTP(jsonWriter{w, r}, r) // says what is wrong, and sets Allow
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// jsonWriter answers with an error in JSON instead of the text that is written to it.
type jsonWriter struct {
	http.ResponseWriter
	r *http.Request
}

func (w jsonWriter) WriteHeader(status int) {
	text := strings.ToLower(http.StatusText(status))
	writeError(w.ResponseWriter, w.r, newError(status, strings.ReplaceAll(text, " ", "_"), text))
}

func (w jsonWriter) Write(text []byte) (int, error) { return len(text), nil }

// plainPaths refuses paths that are not clean or have escapes, so that a proxy in front decides by the path that is
// routed here.
func plainPaths(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, clean := r.URL.Path, path.Clean(r.URL.Path)
		isClean := strings.HasPrefix(p, "/") && strings.TrimSuffix(p, "/") == strings.TrimSuffix(clean, "/")
		if p != r.URL.EscapedPath() || !isClean {
			writeError(w, r, badRequest("bad_path", "path must be clean and without escapes"))
			return
		}
		h.ServeHTTP(w, r)
	})
}
