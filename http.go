// Bodies and answers of both roles: media types, limits, errors as JSON, bearer tokens. Roles are not known here;
// json.go reads and writes the JSON itself.

package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"io"
	"mime"
	"net/http"
	"path"
	"strings"
	"time"
)

const jsonType = "application/json"

// readBody reads at most limit bytes of the request's body into buf.
func readBody(w http.ResponseWriter, r *http.Request, limit int64, buf *bytes.Buffer) ([]byte, error) {
	_, err := buf.ReadFrom(http.MaxBytesReader(w, r.Body, limit))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return nil, errBodyTooLarge
	}
	if err != nil {
		return nil, errNotJSON // the client broke off, or its chunks are malformed
	}
	return buf.Bytes(), nil
}

// isJSON reports whether the request says that its body is JSON.
func isJSON(r *http.Request) bool { return hasMediaType(r, jsonType) }

func hasMediaType(r *http.Request, want string) bool {
	value := r.Header.Get("Content-Type")
	if value == want {
		return true
	}
	mediaType, _, err := mime.ParseMediaType(value)
	return err == nil && mediaType == want
}

// readJSON reads a body of at most limit bytes as one JSON object. A request without a Content-Type is taken at its
// word; a wrong one is refused, which also keeps out what a form of another site can post.
func readJSON(w http.ResponseWriter, r *http.Request, limit int64) (object, error) {
	body, err := readTyped(w, r, limit)
	if err != nil {
		return nil, err
	}
	return parseObject(body)
}

// readTyped is readJSON without looking at the JSON.
func readTyped(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	if r.Header.Get("Content-Type") != "" && !isJSON(r) {
		return nil, errMediaType
	}
	return readBody(w, r, limit, new(bytes.Buffer))
}

var (
	errBodyTooLarge = newError(http.StatusRequestEntityTooLarge, "too_large", "request body too large")
	errMediaType    = newError(http.StatusUnsupportedMediaType, "media_type", "content type must be application/json")
	errClosing      = newError(http.StatusServiceUnavailable, "shutting_down", "shutting down")
)

// writeError answers {"error":"…","code":"…"}. What is no apiError is nothing that a client may see.
func writeError(w http.ResponseWriter, err error) {
	e := newError(http.StatusInternalServerError, "internal", "internal error")
	errors.As(err, &e)
	writeJSON(w, e.status, e)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	body := append(marshal(v), '\n')
	w.Header().Set("Content-Type", jsonType)
	w.WriteHeader(status)
	w.Write(body)
}

// refusedBody is how long a refused body that goes on is still read: a connection that is closed before takes the answer
// with it.
const refusedBody = 500 * time.Millisecond

// handler answers with a status and what becomes a JSON body, or with an error. It writes nothing but headers itself.
type handler func(w http.ResponseWriter, r *http.Request) (status int, answer any, err error)

func (h handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	status, answer, err := h(w, r)
	if err != nil {
		if hasMediaType(r, ndjson) { // the body may go on, and net/http would read it before it answers
			w.Header().Set("Connection", "close")
			http.NewResponseController(w).SetReadDeadline(time.Now().Add(refusedBody))
		}
		writeError(w, err)
		return
	}
	writeJSON(w, status, answer)
}

// readiness is how both roles tell theirs.
func readiness(ready bool) (status int, said string) {
	if !ready {
		return http.StatusServiceUnavailable, "not_ready"
	}
	return http.StatusOK, "ready"
}

// hasBearer reports whether the request has that bearer token (RFC 6750).
func hasBearer(r *http.Request, want secret) bool {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.EqualFold(scheme, "Bearer") && sameSecret(token, want)
}

// sameSecret compares in a time that tells nothing of either, also not the length.
func sameSecret(got string, want secret) bool {
	a, b := sha256.Sum256([]byte(got)), sha256.Sum256([]byte(want))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

// jsonErrors answers what mux has no route for in JSON, not in plain text.
func jsonErrors(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h, pattern := mux.Handler(r)
		if pattern != "" {
			mux.ServeHTTP(w, r)
			return
		}
		plain := answerInMemory{header: w.Header()}
		h.ServeHTTP(&plain, r) // sets Allow
		text := strings.ToLower(http.StatusText(plain.status))
		writeError(w, newError(plain.status, strings.ReplaceAll(text, " ", "_"), text))
	})
}

// plainPaths refuses paths that are not clean or have escapes: a proxy that decides by the path must decide on what is
// routed.
func plainPaths(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, clean := r.URL.Path, path.Clean(r.URL.Path)
		if p != r.URL.EscapedPath() || p != clean && p != clean+"/" {
			writeError(w, badRequest("bad_path", "path must be clean and without escapes"))
			return
		}
		h.ServeHTTP(w, r)
	})
}

// inProcess is a client's way to a handler in the same process. It does not end with the request's context: the handler
// must not take long.
type inProcess struct{ http.Handler }

func (p inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	a := answerInMemory{header: http.Header{}}
	p.ServeHTTP(&a, r)
	return &http.Response{StatusCode: a.status, Header: a.header, Body: io.NopCloser(&a.body)}, nil
}

// answerInMemory is an answer of a handler that sets a status.
type answerInMemory struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (a *answerInMemory) Header() http.Header { return a.header }

func (a *answerInMemory) WriteHeader(status int) { a.status = status }

func (a *answerInMemory) Write(b []byte) (int, error) { return a.body.Write(b) }
