/* The library's version, for people; programs go by struct_size. */
#ifndef DLATTN_VERSION_H_
#define DLATTN_VERSION_H_

#define DLATTN_VERSION "1.0.0"

#endif /* DLATTN_VERSION_H_ */
