package main

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"mime"
	"net/http"
	"strings"
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

// readJSON reads a body of at most limit bytes as one JSON object. A request
// without a Content-Type is taken at its word; a wrong one is refused, which
// also keeps out what a form of another site can post.
func readJSON(w http.ResponseWriter, r *http.Request, limit int64) (object, error) {
	if r.Header.Get("Content-Type") != "" && !isJSON(r) {
		return nil, errMediaType
	}
	var buf bytes.Buffer
	body, err := readBody(w, r, limit, &buf)
	if err != nil {
		return nil, err
	}
	return parseObject(body)
}

// writeJSON answers with a JSON body.
func writeJSON(w http.ResponseWriter, status int, v any) {
	body := append(marshal(v), '\n')
	w.Header().Set("Content-Type", jsonType)
	w.WriteHeader(status)
	w.Write(body)
}

// writeError answers {"error":"…"} with a fixed text.
func writeError(w http.ResponseWriter, status int, text string) {
	writeJSON(w, status, map[string]string{"error": text})
}

// writeBodyError answers an error of readBody or readJSON.
func writeBodyError(w http.ResponseWriter, err error) {
	switch err {
	case errBodyTooLarge:
		writeError(w, http.StatusRequestEntityTooLarge, err.Error())
	case errMediaType:
		writeError(w, http.StatusUnsupportedMediaType, err.Error())
	default:
		writeError(w, http.StatusBadRequest, err.Error())
	}
}

// hasBearer reports whether the request has that bearer token (RFC 6750).
func hasBearer(r *http.Request, want secret) bool {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.EqualFold(scheme, "Bearer") && sameSecret(token, want)
}

// sameSecret compares in a time that tells nothing of either, also not the
// length.
func sameSecret(got string, want secret) bool {
	a, b := sha256.Sum256([]byte(got)), sha256.Sum256([]byte(want))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

// jsonErrors answers what mux has no route for in JSON, not in plain text.
func jsonErrors(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handler, pattern := mux.Handler(r)
		if pattern != "" {
			mux.ServeHTTP(w, r)
			return
		}
		head := statusOnly{header: w.Header()}
		handler.ServeHTTP(&head, r) // sets Allow
		writeError(w, head.status, strings.ToLower(http.StatusText(head.status)))
	})
}

// statusOnly takes an answer and keeps all but its body.
type statusOnly struct {
	header http.Header
	status int
}

func (s *statusOnly) Header() http.Header { return s.header }

func (s *statusOnly) WriteHeader(status int) { s.status = status }

func (s *statusOnly) Write(b []byte) (int, error) { return len(b), nil }
